"""The small pipelines that come with the package, complete folders for `DnDPipeline.from_pretrained`."""

from pathlib import Path


def bundled_checkpoint(name: str) -> str:
    """The folder of a bundled pipeline, e.g. `bundled_checkpoint("words")`: pictures of 100 English words.

    Raises:
        ValueError: there is no bundled pipeline of that name; the message lists those that are.
    """
    folders = {path.parent.name: path.parent for path in Path(__file__).parent.glob("*/model_index.json")}
    if name not in folders:
        raise ValueError(f"`name` must be one of {sorted(folders)}, got {name!r}.")
    return str(folders[name])
