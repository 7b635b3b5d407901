"""What is to be made: labels and prompts as users give them, checked, as a tensor that the transformer reads."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .prompts import prompt_tokens


def read_conditions(
    transformer: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    class_labels: Any,
    prompt: str | Sequence[str] | None,
) -> Tensor:
    """`(n,)` class labels, or `(n, prompt_length)` tokens of a prompt.

    Raises:
        ValueError: they are not what this transformer takes.
    """
    if prompt is not None and class_labels is not None:
        raise ValueError("`prompt` and `class_labels` must not both be given.")
    length = getattr(transformer.config, "prompt_length", 0)
    if prompt is not None:
        return prompt_tokens(tokenizer, prompt, length)
    if not length:
        return torch.tensor(class_ids(transformer.config, class_labels))
    if class_labels is None:
        raise ValueError("`prompt` must be given: this model reads text.")
    return transformer.check_conditions(class_labels)


def named_labels(config: Any) -> dict[str, int]:
    """Class names and their ids; a name such as "tench, Tinca tinca" also counts for each of its parts."""
    labels: dict[str, int] = {}
    for index, name in sorted(config.id2label.items()):
        for part in (name, *name.split(",")):
            labels.setdefault(part.strip(), index)
    return labels


def ids_of_names(config: Any, label: str | Sequence[str]) -> list[int]:
    """The ids of class names.

    Raises:
        ValueError: a name is unknown; the message proposes near ones.
    """
    labels, ids = named_labels(config), []
    for name in [label] if isinstance(label, str) else label:
        if name not in labels:
            known = {one.lower(): one for one in labels}
            near = [known[one] for one in get_close_matches(name.lower(), known, n=3, cutoff=0.5)]
            few = ", ".join(map(repr, labels)) if len(labels) <= 20 else "`pipe.labels` lists them"
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"{few}."
            raise ValueError(f"`class_labels` must be names of this model's classes, got {name!r}: {hint}")
        ids.append(labels[name])
    return ids


def class_ids(config: Any, class_labels: Any) -> list[int]:
    """The ids of classes, given as names or numbers, one or several; None where there is one class.

    Raises:
        ValueError: an unknown name, or no integer in `[0, num_classes)`.
    """
    num_classes = config.num_classes
    if class_labels is None:
        if num_classes > 1:
            raise ValueError(f"`class_labels` must be given: this model has {num_classes} classes.")
        class_labels = 0
    if hasattr(class_labels, "tolist"):  # tensors and arrays
        class_labels = class_labels.tolist()
    if isinstance(class_labels, (int, float, str)):
        class_labels = [class_labels]
    class_labels = [label.item() if hasattr(label, "item") else label for label in class_labels]
    ids = [ids_of_names(config, label)[0] if isinstance(label, str) else label for label in class_labels]
    wrong = [label for label in ids if isinstance(label, bool) or not isinstance(label, int)]
    wrong = wrong or [label for label in ids if not 0 <= label < num_classes]
    if wrong or not ids:
        raise ValueError(f"`class_labels` must be names or integers in [0, {num_classes}), got {wrong or ids}.")
    return ids
