"""The evaluation of words, with pipelines and engines whose metrics are known beforehand."""

from types import SimpleNamespace

import numpy as np
import pytest

from dnd_hf.data.words import WORDS, WordImages
from dnd_hf.evaluation.words import REAL_SEED, evaluate_words, pixel_spread


class RealPipeline:
    """Generates real images, numbered by its generators' seeds, and remembers those seeds and the labels."""

    def __init__(self):
        self.seeds, self.labels, self.batches = [], [], []

    def __call__(self, class_labels, generator, output_type):
        assert output_type == "np"
        seeds = [g.initial_seed() for g in generator]
        self.seeds += seeds
        self.labels += class_labels
        self.batches.append(len(class_labels))
        dataset = WordImages(10**6, seed=1)
        images = [np.asarray(dataset[s]["image"]) / 255.0 for s in seeds]
        return SimpleNamespace(images=np.stack(images))


class KnowingEngine:
    """Reads images in the order they are made in; every word that starts with a letter of `blind` is missed."""

    def __init__(self, blind=""):
        self.blind, self.count = blind, 0

    def __call__(self, images):
        words = [WORDS[(self.count + i) % 100] for i in range(len(images))]
        self.count += len(images)
        return ["?" if word[0] in self.blind else word for word in words]


def test_pixel_spread_is_the_mean_over_labels_of_the_mean_deviation_of_a_pixel():
    images = np.zeros((5, 1, 2, 3), np.uint8)
    images[1, 0, 0] = 255  # label 7: one of two pixels is 0 and 1 (deviation 0.5), the other constant: mean 0.25
    images[2:, 0, 1, 0] = (0, 51, 102)  # label 2: values 0, 0.2, 0.4 in one of six channels: sqrt(0.08 / 3) / 6
    expected = (0.25 + np.sqrt(0.08 / 3) / 6) / 2
    assert pixel_spread(images, [7, 7, 2, 2, 2]) == pytest.approx(expected)


def test_pixel_spread_is_0_for_repeated_images_and_at_most_half():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    assert pixel_spread(images[[0, 0, 1, 1]], [0, 0, 1, 1]) == 0
    opposite = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    assert pixel_spread(opposite, [0, 0]) == 0.5


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3)), [0, 0], "images is float64"),
        (np.zeros((2, 4, 4), np.uint8), [0, 0], r"\(2, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), [], "n > 0"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0], r"labels has shape \(1,\); it must be \(2,\)"),
    ],
)
def test_pixel_spread_names_what_is_wrong_with_its_input(images, labels, message):
    with pytest.raises(ValueError, match=message):
        pixel_spread(images, labels)


def test_the_same_kind_of_images_gives_the_same_metrics():
    result = evaluate_words(RealPipeline(), num_images_per_word=4, engine=KnowingEngine())
    assert result["num_images"] == 400
    assert result["accuracy"] == result["real_accuracy"] == result["accuracy_ratio"] == 1
    assert result["spread_ratio"] == pytest.approx(1, abs=0.05)
    assert list(result["word_accuracy"]) == list(WORDS)


def test_a_word_that_is_never_read_counts_against_the_share_of_all_and_of_itself_only():
    result = evaluate_words(RealPipeline(), num_images_per_word=2, engine=KnowingEngine(blind="Z"))
    assert result["accuracy"] == 0.99
    assert [word for word, share in result["word_accuracy"].items() if share < 1] == ["ZEBRA"]
    assert result["word_accuracy"]["ZEBRA"] == 0


def test_an_engine_that_reads_nothing_gives_no_ratio():
    assert np.isnan(evaluate_words(RealPipeline(), 2, engine=lambda images: [""] * len(images))["accuracy_ratio"])


def test_every_image_has_its_own_seed_and_other_seeds_share_none():
    one, two = RealPipeline(), RealPipeline()
    evaluate_words(one, 2, seed=0, engine=KnowingEngine())
    evaluate_words(two, 2, seed=1, engine=KnowingEngine())
    assert len(set(one.seeds + two.seeds)) == 400
    assert one.labels == two.labels == list(range(100)) * 2


def test_the_batch_size_changes_no_metric():
    pipeline = RealPipeline()
    small = evaluate_words(pipeline, 2, batch_size=37, engine=KnowingEngine())
    assert pipeline.batches == [37] * 5 + [15]
    assert small == evaluate_words(RealPipeline(), 2, batch_size=200, engine=KnowingEngine())


def test_real_images_have_the_size_of_generated_ones_and_a_seed_of_their_own():
    seen = []

    def pipeline(class_labels, generator, output_type):
        return SimpleNamespace(images=np.random.default_rng(0).random((len(class_labels), 48, 160, 3)))

    def engine(images):
        seen.extend(images)
        return [""] * len(images)

    evaluate_words(pipeline, 2, seed=5, engine=engine)
    expected = WordImages(200, seed=REAL_SEED + 5, height=48, width=160)
    assert seen[200].tobytes() == expected[0]["image"].tobytes()
    assert seen[-1].tobytes() == expected[199]["image"].tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images_per_word": 1}, "`num_images_per_word` must be at least 2, got 1"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_generated(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_words(None, **arguments)
