"""The order of training data: sample i of a run depends only on the seed and i, so a run can resume anywhere."""

from functools import lru_cache
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import Dataset, Subset


class SizedDataset(Protocol):
    """A map-style data set that knows its length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class TrainingStream(Dataset):
    """All samples of a training run, epoch after epoch, as one map-style dataset to be read in order.

    Sample i is item `i % len(dataset)` of the shuffle of its epoch, and its random augmentation has a seed of its own.
    Resuming is therefore to start at another sample, whatever the number of processes or workers.

    Args:
        dataset: map-style; random choices come from torch's global generator.
        num_samples: length of the stream.
        seed: of the shuffles and the augmentation.
        first_sample: where the stream starts, counted from the start of the run.
    """

    def __init__(self, dataset: SizedDataset, num_samples: int, seed: int, first_sample: int = 0):
        if not len(dataset):
            raise ValueError("the training data set is empty.")
        self.dataset, self.num_samples, self.seed, self.first_sample = dataset, num_samples, seed, first_sample

    def __len__(self) -> int:
        return self.num_samples - self.first_sample

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}; it must be in [0, {len(self)})")
        sample = self.first_sample + index
        epoch, position = divmod(sample, len(self.dataset))
        item = shuffled(len(self.dataset), mixed_seed(self.seed, epoch))[position]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, position))
            return self.dataset[int(item)]


def mixed_seed(*keys: int) -> int:
    """A seed in [0, 2^32) that looks random in each of the keys; torch's CPU generator reads no more than 32 bits."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


@lru_cache(maxsize=2)
def shuffled(length: int, seed: int) -> torch.Tensor:
    """A random order of `range(length)`."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def hold_out(dataset: SizedDataset, num_items: int, seed: int, group_size: int = 1) -> tuple[Subset, Subset]:
    """Splits a dataset at random into (the rest, at least `num_items` held-out items).

    Args:
        dataset: map-style.
        num_items: how many items to hold out.
        seed: of the draw.
        group_size: this many neighbouring items (the crops of one image) stay together.

    Raises:
        ValueError: nothing would be left to train on.
    """
    groups = -(-num_items // group_size)
    if groups * group_size >= len(dataset):
        raise ValueError(
            f"cannot hold {num_items} items out of a data set of {len(dataset)}; a smaller `num_validation_images` can."
        )
    order = shuffled(len(dataset) // group_size, seed)
    items = (order[:, None] * group_size + torch.arange(group_size)).flatten().tolist()
    source = cast(Dataset, dataset)
    return Subset(source, items[groups * group_size :]), Subset(source, items[: groups * group_size])
