"""Completion of images: whose pixels and codes stay, that the hole is not seen, what is refused."""

import numpy as np
import PIL.Image
import pytest
import torch

from dnd_hf.pipelines.inpainting import Hole, composited, hole_of_cells


@pytest.fixture(params=["make_pipeline", "make_rq_pipeline"])
def pipe(request):
    return request.getfixturevalue(request.param)()


@pytest.fixture
def image(make_pipeline) -> PIL.Image.Image:
    """An image of the tiny models' size, 4 pixels high and 6 wide, with random pixels."""
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))


def mask(rows=slice(None), columns=slice(None)) -> PIL.Image.Image:
    white = np.zeros((4, 6), dtype=np.uint8)
    white[rows, columns] = 255
    return PIL.Image.fromarray(white)


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_pixels_outside_of_the_mask_stay_and_those_inside_are_made(pipe, image):
    (made,) = pipe(1, image=image, mask_image=mask(rows=slice(2, 4)), mask_ring=0, generator=0).images
    np.testing.assert_array_equal(pixels(made)[:2], pixels(image)[:2])
    assert (pixels(made)[2:] != pixels(image)[2:]).mean() > 0.5


def test_cells_without_a_masked_pixel_keep_their_codes_and_the_others_are_sampled_after_them(pipe, image):
    options = dict(image=image, mask_image=mask(rows=slice(3, 4)), mask_ring=0, generator=0, output_type="codes")
    codes = pipe(1, **options).images
    seen = torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
    seen[:, :, 2:] = seen[:, :, 1:2]  # the whole cells, and below them one more of the pixels at their side
    with torch.no_grad():
        encoded = pipe.vqvae.encode(seen).codes
    kept = torch.zeros_like(encoded, dtype=torch.bool)
    kept[:, :1] = True
    assert torch.equal(codes, pipe.transformer.generate([1], codes=encoded, codes_mask=kept, generator=0))
    assert torch.equal(codes[:, 0], encoded[:, 0])


@pytest.mark.parametrize("num_particles", [1, 3])
def test_what_was_in_the_hole_changes_nothing(num_particles, pipe, image):
    other = pixels(image).astype(np.uint8)
    other[2:] = 255 - other[2:]
    options = dict(mask_image=mask(rows=slice(2, 4)), mask_ring=0, generator=0, num_particles=num_particles)
    first, second = (pipe(1, image=one, **options).images[0] for one in (image, PIL.Image.fromarray(other)))
    np.testing.assert_array_equal(pixels(first), pixels(second))


def test_a_hole_between_kept_cells_has_the_mean_colour_of_the_rest_of_the_box_around_them():
    """A grid of 3 x 4 cells of 2 x 2 pixels: the hole in the first row, the last column is beyond the box."""
    pixels = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 6, 8, dtype=torch.bool)
    mask[..., :2, 2:4] = mask[..., 7] = True
    seen = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.arange(12).view(1, 3, 4, 1)

    cells = hole_of_cells(mask, (2, 2), 0)
    codes = Hole(pixels, mask, cells, (2, 2), feather=0).encoded(encode)
    assert torch.equal(codes[..., :3, 0], torch.arange(12).view(1, 3, 4)[..., :3])
    expected = pixels[..., [0, 1, 2, 3, 4, 5, 5, 5]].clone()
    expected[..., :2, 2:4] = pixels[..., :6].masked_fill(mask[..., :6], 0).sum((2, 3), keepdim=True) / 32
    torch.testing.assert_close(seen[0], expected)


def test_each_image_of_a_batch_is_encoded_as_by_itself():
    pixels = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 1, 4, 6, dtype=torch.bool)
    mask[0, :, 2:] = mask[1, :, :, 4:] = mask[2, :, 2:] = True

    def encode(images: torch.Tensor) -> torch.Tensor:
        return images[:, :1, ::2, ::2].permute(0, 2, 3, 1)

    cells = hole_of_cells(mask, (2, 2), 0)
    codes = Hole(pixels, mask, cells, (2, 2), feather=0).encoded(encode)
    assert torch.equal(codes[~cells], pixels[:, 0, ::2, ::2][~cells][:, None])


def test_a_ring_of_cells_around_the_mask_is_sampled_too():
    white = torch.zeros(1, 1, 10, 12, dtype=torch.bool)
    white[..., 5, 6] = True  # cell (2, 3) of 5 x 6
    for ring, expected in ((0, (slice(2, 3), slice(3, 4))), (1, (slice(1, 4), slice(2, 5)))):
        cells = torch.zeros(1, 5, 6, dtype=torch.bool)
        cells[(slice(None), *expected)] = True
        assert torch.equal(hole_of_cells(white, (2, 2), ring), cells)


def test_the_border_is_blended_linearly_over_the_feather():
    white = torch.zeros(1, 1, 1, 8, dtype=torch.bool)
    white[..., 5:] = True
    sample, user = torch.ones(1, 3, 1, 8), torch.zeros(1, 3, 1, 8)
    for feather, expected in ((0, [0, 0, 0, 0, 0, 1, 1, 1]), (3, [0, 0, 0.25, 0.5, 0.75, 1, 1, 1])):
        assert composited(sample, user, white, feather)[0, 0, 0].tolist() == expected


def test_one_image_is_for_all_labels_and_several_are_one_for_each(pipe, image):
    options = dict(mask_image=mask(rows=slice(2, 4)), mask_ring=0, generator=[1, 2, 3, 4], num_images_per_label=2)
    same = pipe([0, 1], image=image, **options).images
    several = pipe([0, 1], image=[image, image], **options).images
    assert len(same) == 4
    for one, other in zip(same, several):
        np.testing.assert_array_equal(pixels(one), pixels(other))


def test_candidates_and_particles_keep_the_pixels_of_the_user(pipe, image):
    seen = []

    def rank(images, labels):
        seen.extend(images)
        return range(len(images))

    options = dict(image=image, mask_image=mask(columns=slice(0, 2)), mask_ring=0, num_particles=2)
    (made,) = pipe(1, **options, num_candidates=3, rank_by=rank).images
    for one in (made, *seen):
        np.testing.assert_array_equal(pixels(one)[:, 2:], pixels(image)[:, 2:])
    np.testing.assert_array_equal(pixels(made), pixels(seen[-1]))


def test_masks_of_all_types_mean_the_same(pipe, image):
    white = mask(rows=slice(2, 4))
    array = np.asarray(white) / 255
    (expected,) = pipe(1, image=image, mask_image=white, mask_ring=0, generator=0).images
    for same in (array, array > 0, torch.tensor(array), torch.tensor(array)[None], [torch.tensor(array)[None, None]]):
        (made,) = pipe(1, image=image, mask_image=same, mask_ring=0, generator=0).images
        np.testing.assert_array_equal(pixels(made), pixels(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mask_image=None), "`image` without a `mask_image` must be smaller than what is made, 4 x 6 pixels"),
        (dict(image=None), "`mask_image` needs an `image`"),
        (dict(mask_image=mask()), "`mask_image` must be white where .* and black"),
        (dict(mask_image=mask(rows=slice(0, 0))), "`mask_image` must be white where .* and black"),
        (dict(mask_image=mask().resize((6, 6))), "`mask_image` must be 4 pixels high and 6 wide"),
        (dict(mask_image=np.zeros((6, 4))), "`mask_image` must have shape"),
        (dict(mask_image=np.full((4, 6), 2.0)), "`mask_image` must have values in"),
        (dict(mask_image="mask.png"), "`mask_image` must be PIL images"),
        (dict(mask_image=[mask(rows=slice(2, 4))] * 3), "`mask_image` must be one, or one for each of 1 labels, got 3"),
        (dict(image=np.zeros((2, 4, 6, 3))), "`image` must be one, or one for each of 1 labels, got 2"),
        (dict(image=np.zeros((4, 8, 3))), "`image` must have shape"),
        (dict(mask_ring=1), "`image` must have a cell that is kept"),
        (dict(mask_ring=-1), "`mask_ring` must be at least 0"),
        (dict(feather=0.5), "`feather` must be a whole number"),
        (dict(temperature=0), "`temperature` must be"),
        (dict(generator=[1, 2]), "`generator` must be"),
        (dict(num_particles=0), "`num_particles` must be at least 1"),
        (dict(image=None, mask_image=None, num_particles=2), "`num_particles` above 1 needs an `image`"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(options, message, make_pipeline, image):
    pipe = make_pipeline()
    pipe.vqvae.encode = None
    arguments = dict(image=image, mask_image=mask(rows=slice(2, 4)), mask_ring=0)
    with pytest.raises(ValueError, match=message):
        pipe(1, **{**arguments, **options})
