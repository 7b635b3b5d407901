"""A folder that goes on where it was interrupted, with the settings that it was begun with alone."""

import json
import reprlib
from pathlib import Path


def changed_settings(file: Path, settings: dict) -> str:
    """What differs from the settings in a JSON file, for people to read, "" where nothing does."""
    earlier = json.loads(file.read_text())
    return "; ".join(
        f"{name} was {reprlib.repr(earlier.get(name))} and is {reprlib.repr(settings.get(name))}"
        for name in settings | earlier
        if earlier.get(name) != settings.get(name)
    )
