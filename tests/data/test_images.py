"""dnd_hf.data.images: pictures to tensors and back, and the sources they come from."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dnd_hf.data.images import (
    ImageTransform,
    TenCrop,
    as_size,
    check_stride,
    collate_images,
    load_image_dataset,
    to_images,
    to_pixels,
)


@pytest.fixture
def picture() -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def test_levels_0_and_255_become_minus_1_and_1():
    levels = np.array([[[0, 255, 51]]], dtype=np.uint8)
    assert to_pixels(Image.fromarray(levels)).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])


def test_pixels_become_the_same_picture_again(picture):
    (again,) = to_images(to_pixels(picture)[None])
    assert (np.array(again) == np.array(picture)).all()


def test_a_picture_of_the_right_size_is_not_resampled(picture):
    assert torch.equal(ImageTransform((40, 60))(picture), to_pixels(picture))


def test_center_crop_is_the_center_of_the_picture_pillow_resizes(picture):
    expected = picture.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    assert torch.equal(ImageTransform(32)(picture), to_pixels(expected))


def test_a_symmetric_picture_stays_symmetric():
    half = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    pixels = ImageTransform((16, 24))(Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1)))
    assert (pixels - pixels.flip(-1)).abs().max() <= 1 / 127.5


@pytest.mark.parametrize("resolution", [(16, 64), (64, 16), (24, 24)])
def test_any_picture_becomes_the_resolution_and_stays_in_range(picture, resolution):
    for mode in ("RGB", "L", "RGBA", "P"):
        for crop in ("center", "random"):
            pixels = ImageTransform(resolution, crop, random_flip=True)(picture.convert(mode))
            assert pixels.shape == (3, *resolution) and pixels.dtype == torch.float32
            assert pixels.min() >= -1 and pixels.max() <= 1


def test_random_crops_and_flips_are_parts_of_the_picture_and_follow_torchs_seed(picture):
    transform = ImageTransform(40, "random", random_flip=True)
    parts = [to_pixels(picture.crop((left, 0, left + 40, 40))) for left in range(21)]
    parts += [part.flip(-1) for part in parts]
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        crop = transform(picture)
        torch.manual_seed(seed)
        assert torch.equal(crop, transform(picture))
        seen.add(next(i for i, part in enumerate(parts) if torch.equal(crop, part)))
    assert len(seen) > 20


def test_ten_crops_are_the_corners_the_center_and_their_mirror_images(picture):
    crops = TenCrop((20, 30), crop_range=2)(picture)
    pixels = to_pixels(picture)
    assert crops.shape == (10, 3, 20, 30)
    for crop, (top, left) in zip(crops, [(0, 0), (0, 30), (20, 0), (20, 30), (10, 15)]):
        assert torch.equal(crop, pixels[:, top : top + 20, left : left + 30])
    assert torch.equal(crops[5:], crops[:5].flip(-1))


def test_sizes_are_one_or_two_positive_numbers():
    assert as_size(8) == as_size([8]) == (8, 8) and as_size([8, 16]) == (8, 16)
    for wrong in (0, [], [8, 8, 8], [8, -1]):
        with pytest.raises(ValueError, match="one or two positive numbers"):
            as_size(wrong)


def test_sizes_the_stride_does_not_divide_are_refused():
    check_stride((32, 48), (8, 16))
    with pytest.raises(ValueError, match="33 x 48"):
        check_stride((33, 48), (8, 16))


def test_words_are_rendered_at_the_resolution_with_their_names():
    dataset = load_image_dataset("words", ImageTransform((32, 96)), num_images=12)
    batch = collate_images([dataset[i] for i in range(4)])
    assert len(dataset) == 12 and len(dataset.class_names) == 100
    assert batch["pixel_values"].shape == (4, 3, 32, 96) and batch["labels"].tolist() == [0, 1, 2, 3]


def test_a_folder_of_class_folders_has_their_names(tmp_path, picture):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            ImageOps.expand(picture, i).save(tmp_path / name / f"{i}.png")
    dataset = load_image_dataset(str(tmp_path), ImageTransform((40, 60)))
    assert dataset.class_names == ["cat", "dog"] and len(dataset) == 4
    assert torch.equal(dataset[0]["pixel_values"], to_pixels(picture))
    with pytest.raises(ValueError, match="fewer than the 5"):
        load_image_dataset(str(tmp_path), ImageTransform(8), num_images=5)


@pytest.mark.parametrize(
    ("labels", "names"), [(["b", "a", "b"], ["a", "b"]), ([2, 0, 2], ["0", "1", "2"]), (None, ["image"])]
)
def test_labels_may_be_strings_or_integers_or_missing(tmp_path, picture, labels, names):
    columns = {"image": [picture] * 3} | ({"label": labels} if labels else {})
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    dataset = load_image_dataset(str(tmp_path / "saved"), ImageTransform(8))
    assert dataset.class_names == names
    assert [names[dataset[i]["label"]] for i in range(3)] == [str(label) for label in labels or ["image"] * 3]


def test_a_missing_image_column_is_named_with_those_there_are(tmp_path):
    datasets.Dataset.from_dict({"photo": [1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no column 'image'.*photo"):
        load_image_dataset(str(tmp_path / "saved"), ImageTransform(8))


def test_photographs_are_turned_as_their_camera_was_held(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "0.png", exif=exif)
    dataset = load_image_dataset(str(tmp_path), ImageTransform((60, 40)))
    assert torch.equal(dataset[0]["pixel_values"], to_pixels(picture.transpose(Image.Transpose.ROTATE_270)))
