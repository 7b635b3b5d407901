"""The small pipelines that come with the package, complete folders for `DnDPipeline.from_pretrained`."""

from pathlib import Path


def _bundled() -> dict[str, str]:
    return {path.parent.name: str(path.parent) for path in Path(__file__).parent.glob("*/model_index.json")}


def bundled_names() -> list[str]:
    """The names of the bundled pipelines, sorted."""
    return sorted(_bundled())


def bundled_checkpoint(name: str) -> str:
    """The folder of a bundled pipeline: `"words"`, images of 100 English words by label, 32x128 px; or `"verses"`,
    pages of prose in the manner of the King James Bible, 128x128 px, without labels.

    Raises:
        ValueError: there is no bundled pipeline of that name; the message lists those that are.
    """
    if name not in _bundled():
        raise ValueError(f"`name` must be one of {bundled_names()}, got {name!r}.")
    return _bundled()[name]


def checkpoint_path(name: str) -> str:
    """The folder of the bundled pipeline of this name, or else the name: another folder, or an id of the Hub."""
    return _bundled().get(name, name)
