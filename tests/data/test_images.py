"""dnd_hf.data.images: images to tensors and back, and the sources they come from."""

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from dnd_hf.data.images import (
    BrokenImageError,
    ImageDataset,
    ImageTransform,
    ReplaceBrokenImages,
    TenCrop,
    WithMirrorImage,
    check_stride,
    to_images,
    to_pixels,
)
from dnd_hf.data.sources import load_image_dataset
from dnd_hf.training.data_order import TrainingStream


@pytest.fixture
def image() -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def test_levels_0_and_255_become_minus_1_and_1():
    levels = np.array([[[0, 255, 51]]], dtype=np.uint8)
    assert to_pixels(Image.fromarray(levels)).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])


def test_pixels_become_the_same_image_again(image):
    (again,) = to_images(to_pixels(image)[None])
    assert (np.array(again) == np.array(image)).all()


def test_an_image_of_the_right_size_is_not_resampled(image):
    assert torch.equal(ImageTransform((40, 60))(image), to_pixels(image))


def test_center_crop_is_the_center_of_the_image_pillow_resizes(image):
    expected = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    assert torch.equal(ImageTransform(32)(image), to_pixels(expected))


def test_a_crop_range_cuts_the_edges_off_too(image):
    expected = image.resize((72, 48), Image.Resampling.BICUBIC).crop((20, 8, 52, 40))
    assert torch.equal(ImageTransform(32, crop_range=1.5)(image), to_pixels(expected))
    with pytest.raises(ValueError, match="`crop_range` must be at least 1"):
        ImageTransform(32, crop_range=0.9)


def test_an_image_too_thin_to_resize_is_broken_instead_of_filling_the_memory():
    dataset = ImageDataset([{"image": Image.new("L", (1, 100_000))}], ImageTransform(256), ["image"], label_column=None)
    with pytest.raises(BrokenImageError, match=r"1 x 100000 pixels \(width x height\) are too long and thin"):
        dataset[0]


def test_a_symmetric_image_stays_symmetric():
    half = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    pixels = ImageTransform((16, 24))(Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1)))
    assert (pixels - pixels.flip(-1)).abs().max() <= 1 / 127.5


@pytest.mark.parametrize("resolution", [(16, 64), (64, 16), (24, 24)])
def test_any_image_becomes_the_resolution_and_stays_in_range(image, resolution):
    for mode in ("RGB", "L", "RGBA", "P"):
        for crop in ("center", "random"):
            pixels = ImageTransform(resolution, crop, random_flip=True)(image.convert(mode))
            assert pixels.shape == (3, *resolution) and pixels.dtype == torch.float32
            assert pixels.min() >= -1 and pixels.max() <= 1


def test_random_crops_and_flips_are_parts_of_the_image_and_follow_torchs_seed(image):
    transform = ImageTransform(40, "random", random_flip=True)
    parts = [to_pixels(image.crop((left, 0, left + 40, 40))) for left in range(21)]
    parts += [part.flip(-1) for part in parts]
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        crop = transform(image)
        torch.manual_seed(seed)
        assert torch.equal(crop, transform(image))
        seen.add(next(i for i, part in enumerate(parts) if torch.equal(crop, part)))
    assert len(seen) > 20


def test_ten_crops_are_the_corners_the_center_and_their_mirror_images(image):
    crops = TenCrop((20, 30), crop_range=2)(image)
    pixels = to_pixels(image)
    assert crops.shape == (10, 3, 20, 30)
    for crop, (top, left) in zip(crops, [(0, 0), (0, 30), (20, 0), (20, 30), (10, 15)]):
        assert torch.equal(crop, pixels[:, top : top + 20, left : left + 30])
    assert torch.equal(crops[5:], crops[:5].flip(-1))


def test_ten_crops_are_cut_from_the_center_of_a_wide_image(image):
    pixels, crops = to_pixels(image), TenCrop(20, crop_range=2)(image)
    for crop, (top, left) in zip(crops, [(0, 10), (0, 30), (20, 10), (20, 30), (10, 20)]):
        assert torch.equal(crop, pixels[:, top : top + 20, left : left + 20])


def test_a_mirror_image_stands_behind_its_image(image):
    pixels = to_pixels(image)
    assert torch.equal(WithMirrorImage(ImageTransform((40, 60)))(image), torch.stack([pixels, pixels.flip(-1)]))


def test_a_resolution_is_one_or_two_positive_numbers():
    assert ImageTransform(8).resolution == ImageTransform([8]).resolution == (8, 8)
    for wrong in (0, [], [8, 8, 8], [8, -1]):
        with pytest.raises(ValueError, match="`resolution` must be"):
            ImageTransform(wrong)


def test_sizes_the_stride_does_not_divide_are_refused():
    check_stride((32, 48), (8, 16))
    with pytest.raises(ValueError, match="33 x 48"):
        check_stride((33, 48), (8, 16))


def grey(number: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (number, number, number))


@pytest.fixture
def folder(tmp_path) -> str:
    """Twelve grey images; the files of numbers 2, 3 and 9 are broken, each in its own way."""
    for number in range(12):
        grey(20 * number).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "02.png").write_bytes(b"no image")
    (tmp_path / "03.png").write_bytes((tmp_path / "04.png").read_bytes()[:45])
    (tmp_path / "09.png").write_bytes(b"")
    return str(tmp_path)


def numbers_of(items) -> list[int]:
    return [round((item["pixel_values"].mean().item() + 1) * 127.5 / 20) for item in items]


def test_a_broken_image_is_named_and_the_others_are_not_disturbed(folder):
    dataset = load_image_dataset(folder, ImageTransform(8))
    assert numbers_of(dataset[i] for i in range(12) if i not in (2, 3, 9)) == [0, 1, 4, 5, 6, 7, 8, 10, 11]
    for broken in (2, 3, 9):
        with pytest.raises(BrokenImageError, match=f"image .*{broken:02d}.png is broken"):
            dataset[broken]


def test_a_connection_that_fails_makes_no_image_broken(image):
    with fsspec.open("memory://there.png", "wb") as file:
        image.save(file, "png")
    items = [{"image": {"bytes": None, "path": f"memory://{name}.png"}} for name in ("there", "gone")]
    dataset = ImageDataset(items, ImageTransform((40, 60)), ["image"], label_column=None)
    assert torch.equal(dataset[0]["pixel_values"], to_pixels(image))
    with pytest.raises(FileNotFoundError):
        dataset[1]


def test_the_next_image_takes_the_place_of_a_broken_one(folder, caplog):
    part = Subset(load_image_dataset(folder, ImageTransform(8)), [9, 2, 3, 4, 0, 1])
    dataset = ReplaceBrokenImages(part, 0.5)
    assert numbers_of(dataset[i] for i in range(6)) == [4, 4, 4, 4, 0, 1]
    assert numbers_of(dataset[i] for i in (5, 0)) == [1, 4] and len(caplog.records) == 3
    wrapped = ReplaceBrokenImages(Subset(part.dataset, [5, 9]), 0.5)
    assert numbers_of(wrapped[i] for i in range(2)) == [5, 5]


def test_samples_of_a_run_do_not_depend_on_where_it_meets_a_broken_image(folder):
    def samples(first: int) -> list[int]:
        dataset = ReplaceBrokenImages(load_image_dataset(folder, ImageTransform(8, "random", True)), 0.5)
        return numbers_of(TrainingStream(dataset, 30, seed=1, first_sample=first))

    intact = TrainingStream(ImageDataset([{"image": grey(20 * i)} for i in range(12)], ImageTransform(8), ["image"],
                                         label_column=None), 30, seed=1)  # fmt: skip
    expected = [{2: 4, 3: 4, 9: 10}.get(number, number) for number in numbers_of(intact)]
    assert samples(0) == expected and samples(17) == expected[17:]


@pytest.mark.parametrize(("share", "stops"), [(0.25, False), (0.24, True)])
def test_workers_count_broken_images_together(folder, share, stops):
    loader = DataLoader(ReplaceBrokenImages(load_image_dataset(folder, ImageTransform(8)), share), num_workers=3)
    if stops:  # none of the workers meets all three
        with pytest.raises(RuntimeError, match="3 of 12 images cannot be decoded, more than `max_broken_share`"):
            list(loader)
    else:
        assert numbers_of(loader) == [0, 1, 4, 4, 4, 5, 6, 7, 8, 10, 10, 11]


def test_a_part_is_judged_by_the_whole_data_set(folder):
    part = Subset(load_image_dataset(folder, ImageTransform(8)), [2, 0])
    assert numbers_of([ReplaceBrokenImages(part, 0.1, num_images=12)[0]]) == [0]
    with pytest.raises(RuntimeError, match="1 of 2 images cannot be decoded"):
        ReplaceBrokenImages(part, 0.1)[0]


def test_photographs_are_turned_as_their_camera_was_held(tmp_path, image):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "0.png", exif=exif)
    dataset = load_image_dataset(str(tmp_path), ImageTransform((60, 40)))
    assert torch.equal(dataset[0]["pixel_values"], to_pixels(image.transpose(Image.Transpose.ROTATE_270)))
