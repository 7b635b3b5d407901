"""dnd_hf.data.codes: codes come back from disk exactly as they were written."""

import pytest
import torch

from dnd_hf.data.codes import CodesDataset, codes_features, collate_codes, join_codes, write_codes


SHAPE = (3, 5, 2)
CODES = torch.randint(0, 2**16, (11, *SHAPE), generator=torch.Generator().manual_seed(0))
CODES[0, 0, 0] = torch.tensor([0, 65535])
LABELS = torch.arange(11) % 3


def write(folder, output_dir, parts, crops=1):
    features = codes_features(SHAPE, ["ant", "bee", "cat"])
    folder.mkdir()
    for number, part in enumerate(torch.arange(len(CODES)).split(parts)):
        batches = ((CODES[rows], LABELS[rows], rows // crops) for rows in part.split(2))
        write_codes(folder / f"{number:05d}.arrow", features, batches)
    join_codes(folder, output_dir)
    return CodesDataset(output_dir)


@pytest.mark.parametrize("parts", [11, 4])
def test_codes_come_back_exactly_in_order_from_any_number_of_shards(tmp_path, parts):
    dataset = write(tmp_path / "shards", tmp_path / "codes", parts)
    batch = collate_codes([dataset[i] for i in range(len(dataset))])
    assert torch.equal(batch["codes"], CODES) and batch["codes"].dtype == torch.int64
    assert torch.equal(batch["labels"], LABELS)
    assert dataset.shape == SHAPE and dataset.class_names == ["ant", "bee", "cat"]
    assert not (tmp_path / "shards").exists()


def test_the_dataset_knows_how_many_rows_a_picture_has(tmp_path):
    assert write(tmp_path / "one", tmp_path / "codes", 4).crops_per_image == 1
    assert write(tmp_path / "eleven", tmp_path / "crops", 4, crops=11).crops_per_image == 11


def test_codes_that_do_not_fit_16_bits_are_refused(tmp_path):
    for wrong in (-1, 2**16):
        batch = (torch.full((1, *SHAPE), wrong), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        with pytest.raises(ValueError, match="must lie in"):
            write_codes(tmp_path / "codes.arrow", codes_features(SHAPE, ["ant"]), [batch])


def test_a_folder_without_codes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no codes dataset"):
        CodesDataset(tmp_path)
