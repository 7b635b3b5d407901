"""Best of N: which candidates there are, how they are ranked, what is refused."""

import numpy as np
import pytest
import torch

from dnd_hf import DnDPipeline


LABELS = ["goldfish", "tench", "goldfish"]


@pytest.fixture(params=["make_pipeline", "make_rq_pipeline"])
def pipe(request):
    return request.getfixturevalue(request.param)(class_dropout_prob=0.1)


def codes_of(pipe, **options) -> torch.Tensor:
    return pipe(LABELS, output_type="codes", **options).images


@pytest.mark.parametrize("generator", [7, [7, 8, 9]], ids=["seed", "seeds"])
def test_the_first_candidate_is_the_image_without_candidates_and_the_others_differ(generator, pipe):
    seen = []

    def rank(images, labels):
        seen.extend(images)
        assert labels == [1, 0, 1] * 4
        return torch.arange(12, 0, -1)  # the first is the best

    options = dict(generator=generator, temperature=3.0)  # so that no two are the same by chance
    expected = codes_of(pipe, **options)
    assert torch.equal(codes_of(pipe, **options, num_candidates=4, rank_by=rank), expected)
    plain = pipe(LABELS, **options).images
    for image, candidate in zip(plain, seen[:3]):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(candidate))
    assert len({image.tobytes() for image in seen}) == 12


@pytest.mark.parametrize("rank_by", [None, "likelihood", "guidance"])
def test_the_best_candidate_has_the_highest_score(rank_by, pipe):
    candidates = []
    pipe(
        LABELS,
        generator=[7, 8, 9],
        num_candidates=5,
        callback_on_step_end=lambda pipe, step, _, tensors: candidates.append(tensors["codes"]),
    )
    codes, labels = candidates[-1], [1, 0, 1] * 5
    scores = pipe.transformer.score(labels, codes).total
    if rank_by == "guidance":
        scores = scores - pipe.transformer.score(None, codes).total
    best = codes.unflatten(0, (5, 3))[scores.view(5, 3).argmax(0), [0, 1, 2]]
    chosen = codes_of(pipe, generator=[7, 8, 9], num_candidates=5, rank_by=rank_by)
    assert torch.equal(chosen, best)
    assert not torch.equal(chosen, codes_of(pipe, generator=[7, 8, 9]))


def test_of_equal_candidates_the_first_is_taken(pipe):
    expected = codes_of(pipe, generator=1)
    assert torch.equal(codes_of(pipe, generator=1, num_candidates=3, rank_by=lambda images, labels: [0] * 9), expected)


def test_images_of_one_label_are_chosen_each_by_itself(make_pipeline):
    pipe = make_pipeline()
    options = dict(num_images_per_label=2, generator=[1, 2, 3, 4], num_candidates=3, output_type="codes")
    whole = pipe(["tench", "goldfish"], **options).images
    one = pipe("goldfish", **{**options, "num_images_per_label": 1, "generator": [4]}).images
    assert whole.shape[0] == 4 and torch.equal(whole[3], one[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_candidates=0), "`num_candidates` must be at least 1"),
        (dict(num_candidates=2.0), "`num_candidates` must be a whole number"),
        (dict(num_candidates=2, rank_by="beauty"), "`rank_by` must be one of .* or a function, got 'beauty'"),
        (dict(num_candidates=2, rank_by="guidance"), '`rank_by` must not be "guidance"'),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(options, message, make_pipeline):
    pipe = make_pipeline(class_dropout_prob=0.0)
    pipe.transformer.layers = None
    with pytest.raises(ValueError, match=message):
        pipe(0, **options)


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_a_function_that_does_not_rank_every_image_is_an_error(scores, make_pipeline):
    with pytest.raises(ValueError, match="`rank_by` must return a number for each of 2 images"):
        make_pipeline()(0, num_candidates=2, rank_by=lambda images, labels: scores)


def test_without_a_tokenizer_there_are_no_images_to_rank(make_pipeline):
    pipe = DnDPipeline(make_pipeline().transformer, None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(0, num_candidates=2, output_type="codes").images.shape == (1, 2, 3, 2)
    with pytest.raises(ValueError, match="for a pipeline without a `vqvae`"):
        pipe(0, num_candidates=2, rank_by=lambda images, labels: [0, 1], output_type="codes")
