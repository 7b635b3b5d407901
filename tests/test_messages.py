"""dnd_hf.messages: numbers with their nouns, and messages on lines of their own."""

import logging

import pytest
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from dnd_hf.messages import BesideProgressBars, close_progress_bars, counted


def test_a_noun_is_in_the_singular_for_one_and_only_for_one():
    assert [counted(n, "image") for n in (0, 1, 2, 1000)] == ["0 images", "1 image", "2 images", "1,000 images"]
    assert [counted(n, "class") for n in (1, 2)] == ["1 class", "2 classes"]


class Warns(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        logging.getLogger("beside").warning("image %d is broken", index)
        return index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_message_has_a_line_of_its_own_while_a_bar_is_shown(capfd, num_workers):
    handler = BesideProgressBars()
    logging.getLogger("beside").addHandler(handler)
    try:
        with tqdm(total=2, unit=" images", mininterval=0) as progress:
            for _ in DataLoader(Warns(), num_workers=num_workers):
                progress.update()
    finally:
        logging.getLogger("beside").removeHandler(handler)
    written = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in written if "broken" in line] == ["image 0 is broken", "image 1 is broken"]
    assert any("2/2" in line for line in written)


def test_what_is_printed_after_an_error_begins_a_line_also_where_a_bar_was_open(capfd):
    bar = tqdm(total=2)
    bar.update()
    close_progress_bars()
    assert capfd.readouterr().err.endswith("\n")
