"""Opens rows by `datasets`, whose errors become one line that says what is missing or damaged."""

from pathlib import Path
from textwrap import shorten

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError


def open_rows(source: str, /, **options) -> datasets.Dataset | datasets.IterableDataset:
    """`datasets.load_dataset(**options)` of what the user calls `source`.

    Raises:
        FileNotFoundError: there is no such source, neither here nor on the Hub.
        ValueError: no such split, or damaged files.
    """
    try:
        return datasets.load_dataset(**options)
    except (ConnectionError, FileNotFoundError) as error:
        here = "" if Path(source).exists() else f"{Path(source).absolute()} does not exist, and "
        raise FileNotFoundError(f"{source} cannot be opened: {here}{error}") from error
    except (DatasetGenerationError, pa.ArrowInvalid) as error:
        raise ValueError(f"{source} cannot be read: {shorten(str(error.__cause__ or error), 200)}") from error
