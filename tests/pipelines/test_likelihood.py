"""score and classify: their definitions on tiny models, their inputs, and that the bundled model reads."""

import math

import numpy as np
import pytest
import torch

from dnd_hf import DnDPipeline, bundled_checkpoint
from dnd_hf.data.words import WORDS, WordImages


@pytest.fixture(params=["make_pipeline", "make_rq_pipeline"])
def pipe(request):
    return request.getfixturevalue(request.param)(class_dropout_prob=0.1)


@pytest.fixture
def pixels() -> torch.Tensor:
    """Three images in [0, 1] of the tiny models' size."""
    return torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def codes_of(pipe, pixels) -> torch.Tensor:
    return pipe.vqvae.encode(pixels * 2 - 1).codes


def test_a_score_is_that_of_the_codes_in_nats_bits_and_per_depth(pipe, pixels):
    scores = pipe.score(pixels, ["goldfish", 0, 3])
    expected = pipe.transformer.score([1, 0, 3], codes_of(pipe, pixels))
    assert torch.equal(scores.log_probs, expected.log_probs) and torch.equal(scores.total, expected.total)
    torch.testing.assert_close(scores.per_depth.sum(1), scores.total)
    torch.testing.assert_close(scores.per_depth[:, 1], scores.log_probs[..., 1].sum((1, 2)))
    assert scores.bits_per_pixel[0].item() == pytest.approx(-scores.total[0].item() / math.log(2) / 24, rel=1e-5)


def test_one_label_is_for_all_images_and_none_is_the_null_class(pipe, pixels):
    codes = codes_of(pipe, pixels)
    assert torch.equal(pipe.score(pixels, 2).total, pipe.transformer.score([2, 2, 2], codes).total)
    assert torch.equal(pipe.score(pixels).total, pipe.transformer.score(None, codes).total)


def test_batches_change_no_score(pipe, pixels):
    torch.testing.assert_close(pipe.score(pixels, 2, batch_size=2).total, pipe.score(pixels, 2).total)


def test_images_of_all_types_have_the_same_scores(make_pipeline):
    pipe = make_pipeline()
    images = pipe([0, 1]).images
    expected = pipe.score(images, [0, 1]).total
    arrays = np.stack([np.asarray(image) for image in images]) / 255
    tensors = torch.tensor(arrays).permute(0, 3, 1, 2).float()
    for same in (arrays, list(arrays), tensors, list(tensors)):
        torch.testing.assert_close(pipe.score(same, [0, 1]).total, expected)
    torch.testing.assert_close(pipe.score(images[1], 1).total, expected[1:])
    torch.testing.assert_close(pipe.score([image.convert("RGBA") for image in images], [0, 1]).total, expected)


def test_classes_have_the_probabilities_of_bayes_rule(pipe, pixels):
    codes, priors = codes_of(pipe, pixels), torch.tensor([0.1, 0.2, 0.3, 0.4])
    likelihoods = torch.stack([pipe.transformer.score([label] * 3, codes).total for label in range(4)], dim=1)
    for given, prior in ((None, torch.ones(4)), (priors, priors), ((2 * priors).tolist(), priors)):
        expected = (likelihoods.double().exp() * prior).log()
        expected -= expected.logsumexp(1, keepdim=True)
        found = pipe.classify(pixels, given, batch_size=5)
        torch.testing.assert_close(found.log_probs.double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.labels, expected.argmax(1))


def test_a_class_of_prior_zero_is_impossible_and_costs_nothing(make_pipeline, pixels):
    pipe, rows = make_pipeline(), []
    pipe.transformer.layers[0].register_forward_hook(lambda layer, args, output: rows.append(len(output)))
    found = pipe.classify(pixels, [1, 0, 1, 0])
    assert torch.isneginf(found.log_probs[:, [1, 3]]).all() and set(found.labels.tolist()) <= {0, 2}
    assert sum(rows) == 3 * 2


def test_the_bundled_model_reads_words_that_it_has_only_learnt_to_write():
    pipe = DnDPipeline.from_pretrained(bundled_checkpoint("words"))
    pipe.set_progress_bar_config(disable=True)
    images = WordImages(len(WORDS), seed=2**20)
    chosen = [images[label] for label in (5, 92)]
    priors = [float(label % 10 in (2, 5)) for label in range(100)]  # a fifth of the words, for time
    found = pipe.classify([item["image"] for item in chosen], priors)
    assert found.labels.tolist() == [5, 92]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x[..., :5], r"`images` must have shape \(3, 4, 6\)"),
        (lambda x: x.transpose(2, 3), r"`images` must have shape"),
        (lambda x: (x.numpy() * 255).astype("uint8").transpose(0, 2, 3, 1), "`images` must have values in"),
        (lambda x: x * 3, "`images` must have values in"),
        (lambda x: x * torch.nan, "`images` must have values in"),
        (lambda x: [], "`images` must be PIL images"),
        (lambda x: ["cat.png"], r"`images` must be PIL images.*got \[str\]"),
        (lambda x: [x[0], x[1].numpy()], "`images` must be PIL images"),
    ],
)
def test_images_that_do_not_fit_are_refused(wrong, message, make_pipeline, pixels):
    pipe = make_pipeline()
    for use in (pipe.score, pipe.classify):
        with pytest.raises(ValueError, match=message):
            use(wrong(pixels))


def test_a_pil_image_of_another_size_is_refused_and_not_resized(make_pipeline):
    pipe = make_pipeline()
    (image,) = pipe(0).images
    with pytest.raises(ValueError, match=r"`images` must be 4 pixels high and 6 wide.*got 8 and 6"):
        pipe.classify([image, image.resize((6, 8))])


def test_other_wrong_arguments_are_refused_before_any_work(make_pipeline, make_rq_pipeline, pixels):
    pipe = make_pipeline()
    pipe.vqvae.encode = None
    for priors in ([1, 1, 1], [0, 0, 0, 0], [1, -1, 1, 1], [1, math.nan, 1, 1], [1, math.inf, 1, 1]):
        with pytest.raises(ValueError, match="`label_priors` must be 4 finite numbers"):
            pipe.classify(pixels, priors)
    for use in (pipe.score, pipe.classify):
        with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
            use(pixels, batch_size=0)
    with pytest.raises(ValueError, match="`class_labels` must be one, or one for each of 3 images, got 2"):
        pipe.score(pixels, [0, 1])
    with pytest.raises(ValueError, match="`class_labels` must be names or integers"):
        pipe.score(pixels, 4)
    with pytest.raises(ValueError, match="`class_labels` must be given: this model has no null class"):
        make_pipeline(class_dropout_prob=0.0).score(pixels)
    with pytest.raises(ValueError, match="needs a model of two or more classes"):
        make_pipeline(num_classes=1, id2label=None).classify(pixels)
    with pytest.raises(ValueError, match="need a pipeline with a `vqvae`"):
        DnDPipeline(pipe.transformer, None).score(pixels)
