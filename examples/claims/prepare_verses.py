"""Writes the text of `verses`: the King James Bible of Debian's package bible-kjv, training books and held-out books.

python examples/claims/prepare_verses.py --output_dir verses

`train_books.jsonl` and `held_out_books.jsonl` hold the books whole, one a line; `train_windows.jsonl` holds overlapping
windows of the training books, one for a page: page breaks and line breaks then fall everywhere; `letters.jsonl` holds
those of them that show each letter equally often, for the tokenizer. The columns are "text" and "book".
"""

import json
import random
import re
import shutil
import subprocess
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script


HELD_OUT = ("Ruth", "Est", "Eccl", "Jonah", "John", "Gal", "Jas")
"""5 % of the text: two narratives, wisdom, a prophet, a gospel and two letters. Of the gospels it is John, because the
other three share whole passages with one another."""

VERSE = re.compile(r"(?P<book>\d?[A-Za-z]+)\d+:\d+ (?P<text>.+)")

WINDOW = 40
"""Words of a window: more than the 8 lines of 16 letters of a page hold anywhere in this text."""

SEEN = 80
"""Characters at the start of a window that its page is sure to show."""


def read_books() -> dict[str, list[str]]:
    """The words of each book, by its abbreviation, without the numbers of the verses."""
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    if shutil.which(command[0]) is None:
        raise FileNotFoundError("the program `bible` is missing: apt-get install bible-kjv bible-kjv-text")
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    books: dict[str, list[str]] = {}
    for line in lines:
        verse = VERSE.fullmatch(line)
        if verse is None:
            raise ValueError(f"this line of `{' '.join(command)}` is no verse: {line!r}.")
        books.setdefault(verse["book"], []).extend(verse["text"].split())
    return books


def windows(words: list[str], stride: int) -> list[str]:
    """Each run of `WINDOW` words that begins at a multiple of `stride`."""
    return [" ".join(words[start : start + WINDOW]) for start in range(0, len(words) - WINDOW + 1, stride)]


def balanced(rows: list[dict[str, str]], per_letter: int = 300, seed: int = 0) -> list[dict[str, str]]:
    """For each character, up to `per_letter` random rows that have it among their first `SEEN` characters."""
    order = random.Random(seed).sample(rows, len(rows))
    letters = sorted(set("".join(row["text"] for row in rows)) - {" "})
    return [
        row for letter in letters for row in islice((row for row in order if letter in row["text"][:SEEN]), per_letter)
    ]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} texts")


@dataclass
class VersesArguments:
    """Options of this script."""

    output_dir: Path = HfArg(help="Folder of the four files.")
    stride: int = HfArg(default=4, help="Words from the start of a window to the next.")

    def __post_init__(self):
        if self.stride < 1:
            raise ValueError(f"`stride` must be positive, got {self.stride}.")


def main(args: VersesArguments) -> None:
    books = read_books()
    held_out = [{"text": " ".join(books.pop(book)), "book": book} for book in HELD_OUT]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write(args.output_dir / "held_out_books.jsonl", held_out)
    write(
        args.output_dir / "train_books.jsonl",
        [{"text": " ".join(words), "book": book} for book, words in books.items()],
    )
    rows = [{"text": text, "book": book} for book, words in books.items() for text in windows(words, args.stride)]
    write(args.output_dir / "train_windows.jsonl", rows)
    write(args.output_dir / "letters.jsonl", balanced(rows))


if __name__ == "__main__":
    run_script(main, VersesArguments)
