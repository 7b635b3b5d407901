"""Images and OCR engines whose answers are known, and the distance of two texts by its definition."""

import torch

from dnd_hf.data.images import BrokenImageError


class Levels:
    """Images of one level each, 0, 1, 2, ...; those of `broken` cannot be read. The label is the level."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImageError(index, "file.png", "it is torn")
        return {"pixel_values": torch.full((3, 4, 4), index / 127.5 - 1), "label": index}


def engine_of(texts):
    """Reads an image of level i as `texts[i]`, and fails where that is an exception."""

    def engine(images):
        read = [texts[image.getpixel((0, 0))[0]] for image in images]
        if isinstance(read[0], Exception):
            raise read[0]
        return read

    return engine


def distance(a, b) -> int:
    """Levenshtein's, by its recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
