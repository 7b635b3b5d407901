"""Images larger than the model's own, from nothing and from a user's image: codes, pixels, what is refused."""

import numpy as np
import PIL.Image
import pytest
import torch

from dnd_hf import DnDPipeline


@pytest.fixture(params=["make_pipeline", "make_rq_pipeline"])
def pipe(request):
    """Tiny models of 2 x 3 cells of 2 x 2 pixels."""
    return request.getfixturevalue(request.param)()


@pytest.fixture
def pictures() -> list[PIL.Image.Image]:
    """Two images, 4 pixels high and 6 wide, with random pixels."""
    colours = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(one) for one in colours]


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_larger_image_has_the_codes_of_outpaint_and_begins_with_the_image_of_its_seed(pipe):
    options = dict(generator=[1, 2, 3, 4], num_images_per_label=2, output_type="codes", guidance_scale=1.5)
    options |= dict(top_k=[5, 3], temperature=[0.9, 0.7])
    if not pipe.transformer.config.has_null_class:
        options["guidance_scale"] = 1.0
    codes = pipe([2, 0], height=8, width=10, overlap=1, **options).images
    settings = {name: options[name] for name in ("guidance_scale", "top_k", "temperature", "generator")}
    assert torch.equal(codes, pipe.transformer.outpaint([2, 2, 0, 0], (4, 5), 1, **settings))
    assert codes.shape == (4, 4, 5, 2)
    assert torch.equal(codes[:, :2, :3], pipe([2, 0], **options).images)
    assert torch.equal(codes, pipe([2, 0], height=8, width=10, overlap=1, **options).images)


def test_the_model_s_own_size_is_the_default(pipe):
    (expected,) = pipe(1, generator=3).images
    (made,) = pipe(1, generator=3, height=4, width=6, overlap=1).images
    np.testing.assert_array_equal(pixels(made), pixels(expected))


def test_a_larger_image_is_decoded_in_tiles_of_the_model_s_size(pipe):
    codes = pipe(1, generator=3, height=8, output_type="codes").images
    (made,) = pipe(1, generator=3, height=8, output_type="pt").images
    pipe.vqvae.enable_tiling()
    with torch.no_grad():
        tiled = pipe.vqvae.decode_codes(codes).sample[0]
    torch.testing.assert_close(made, (tiled / 2 + 0.5).clamp(0, 1))
    assert made.shape == (3, 8, 6)


def test_the_pixels_of_the_user_stay_and_the_codes_behind_them_are_made(pipe, pictures):
    options = dict(image=pictures[0], height=8, width=8, mask_ring=0, generator=0)
    (made,) = pipe(1, **options).images
    assert made.size == (8, 8)
    np.testing.assert_array_equal(pixels(made)[:4, :6], pixels(pictures[0]))
    codes = pipe(1, output_type="codes", **options).images
    around = torch.tensor(np.pad(np.asarray(pictures[0]), ((0, 2), (0, 2), (0, 0)), mode="edge"))
    with torch.no_grad():
        encoded = pipe.vqvae.encode(around.float().permute(2, 0, 1)[None] / 127.5 - 1, tiled=True).codes
    kept = torch.zeros(1, 4, 4, 2, dtype=torch.bool)
    kept[:, :2, :3] = True
    given = torch.nn.functional.pad(encoded, (0, 0, 0, 0, 0, 1))
    expected = pipe.transformer.outpaint([1], (4, 4), codes=given, codes_mask=kept, generator=0)
    assert torch.equal(codes, expected) and torch.equal(codes[:, :2, :3], encoded[:, :2, :3])


def test_a_smaller_image_is_gone_on_from_in_the_model_s_own_size(pipe, pictures):
    (part,) = (pictures[0].crop((0, 0, 5, 4)),)  # the third column of cells is half the user's
    (made,) = pipe(1, image=part, mask_ring=0, generator=0).images
    assert made.size == (6, 4)
    np.testing.assert_array_equal(pixels(made)[:, :5], pixels(part))


def test_each_label_may_have_an_image_of_its_own(pipe, pictures):
    options = dict(height=8, mask_ring=0, num_images_per_label=2)
    made = pipe([0, 1], image=pictures, generator=[1, 2, 3, 4], **options).images
    for i, image in enumerate(made):
        np.testing.assert_array_equal(pixels(image)[:4], pixels(pictures[i // 2]))
    (one,) = pipe(1, image=pictures[1], generator=[4], height=8, mask_ring=0).images
    np.testing.assert_array_equal(pixels(made[3]), pixels(one))


def test_a_hole_in_a_larger_image_is_filled_in(pipe):
    large = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 6, 3), dtype=np.uint8))
    white = np.zeros((8, 6), dtype=np.uint8)
    white[2:4, 2:4] = 255
    for num_particles in (1, 3):
        options = dict(height=8, mask_ring=0, generator=0, num_particles=num_particles)
        (made,) = pipe(1, image=large, mask_image=PIL.Image.fromarray(white), **options).images
        changed = (pixels(made) != pixels(large)).any(-1)
        assert changed[2:4, 2:4].all() and changed.sum() == 4


@pytest.mark.parametrize("rank_by", ["likelihood", "guidance"])
def test_the_best_candidate_is_the_one_that_the_windows_give_the_highest_probability(rank_by, make_pipeline):
    pipe, labels = make_pipeline(), [1, 2]
    options = dict(height=6, width=8, overlap=1, output_type="codes", generator=[5, 6])
    best = pipe(labels, num_candidates=3, rank_by=rank_by, **options).images
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    candidates = pipe.transformer.outpaint(labels * 3, (3, 4), 1, generator=generators * 3)
    scores = pipe.transformer.outpaint_log_probs(labels * 3, candidates, 1)
    if rank_by == "guidance":
        scores = scores - pipe.transformer.outpaint_log_probs(None, candidates, 1)
    first = scores.sum((1, 2, 3)).view(3, 2).argmax(0)
    assert torch.equal(best, torch.stack([candidates[first[i] * 2 + i] for i in range(2)]))


def test_a_function_ranks_larger_images(pipe):
    def widest(images, labels):
        assert {image.size for image in images} == {(8, 4)} and labels == [1, 1]
        return [0, 1]

    assert pipe(1, width=8, num_candidates=2, rank_by=widest).images[0].size == (8, 4)


def test_a_warning_says_that_the_image_is_made_in_windows(make_pipeline, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe = make_pipeline()
    pipe(1, output_type="codes")
    assert not caplog.records
    pipe(1, height=8, output_type="codes")
    (record,) = caplog.records
    assert "8 x 6 pixels are more than the model's 4 x 6: the image is made in 3 windows" in record.getMessage()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(height=7), "`height` must be a multiple of 2 and at least 4, got 7"),
        (dict(height=2), "`height` must be a multiple of 2 and at least 4, got 2"),
        (dict(width=4), "`width` must be a multiple of 2 and at least 6, got 4"),
        (dict(width=8.0), "`width` must be a whole number"),
        (dict(height=8, overlap=0), "`overlap` must be at least 1"),
        (dict(width=8, overlap=3), r"`overlap` must be at least 1 and less than the model's grid \(2, 3\), got 3"),
        (dict(height=8, overlap=(1, 2, 3)), "`overlap` must be one whole number or"),
        (dict(width=8, image=np.zeros((4, 10, 3))), "`image` without a `mask_image` must be smaller .* got 4 x 10"),
        (dict(width=8, image=np.zeros((4, 8, 3))), "`image` without a `mask_image` must be smaller"),
        (dict(width=8, image="image.png"), "`image` must be PIL images"),
        (dict(width=8, image=np.zeros((4, 6))), "`image` must have shape"),
        (dict(width=8, image=np.zeros((1, 1, 3))), "`image` must have a cell that is kept"),
        (dict(width=8, image=np.zeros((2, 2, 3)), mask_ring=1), "`image` must have a cell that is kept"),
        (dict(width=8, image=np.zeros((2, 4, 4, 3))), "`image` must be one, or one for each of 1 labels, got 2"),
        (dict(width=8, mask_image=np.zeros((4, 8))), "`mask_image` needs an `image`"),
        (dict(width=8, image=np.zeros((4, 6, 3)), mask_image=np.zeros((4, 6))), "`image` must have shape"),
        (dict(width=8, num_particles=0), "`num_particles` must be at least 1"),
        (dict(num_particles=2), "`num_particles` above 1 needs an `image`, or a `height`"),
        (dict(width=8, generator=[1, 2]), "`generator` must be"),
        (dict(width=8, temperature=0), "`temperature` must be"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_any_work(options, message, make_pipeline):
    pipe = make_pipeline()
    pipe.vqvae.encode = pipe.transformer.outpaint = None
    with pytest.raises(ValueError, match=message):
        pipe(1, **{"mask_ring": 0, **options})


def test_pixels_need_a_tokenizer(make_pipeline):
    pipe = DnDPipeline(make_pipeline().transformer, None)
    with pytest.raises(ValueError, match="`height` and `width` are in pixels"):
        pipe(1, height=8, output_type="codes")
    with pytest.raises(ValueError, match="`image` needs a pipeline with a `vqvae`"):
        pipe(1, image=np.zeros((4, 6, 3)), output_type="codes")
