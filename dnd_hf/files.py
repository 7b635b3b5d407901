"""Files and folders that are either whole or not there, and folders that resume with the same settings only."""

import errno
import json
import os
import reprlib
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to; it replaces `path` when the block ends.

    If the block fails, what was written vanishes and `path` stays as it was. A killed process leaves at most a file or
    folder whose name begins with a dot and ends with `.unfinished`. Each call has its own name, because processes of
    a run whose launcher was killed may still be writing.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.unfinished")
    try:
        yield unfinished
        if unfinished.is_dir():
            remove(path)
        os.replace(unfinished, path)
    finally:
        remove(unfinished)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to write to that becomes `path` when the block ends, and vanishes if the block fails.

    Raises:
        FileExistsError: there is something at `path` other than an empty folder; checked before the block begins.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"The output folder must be new or empty, {path} is not.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as folder:
        folder.mkdir()
        yield folder


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def remove(path: str | os.PathLike) -> None:
    """Removes a file or a folder with all that it holds, if it is there."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keep_settings(file: str | os.PathLike, settings: Mapping[str, Any], what: str) -> None:
    """Writes the settings of a folder's content where there are none yet, and refuses other ones where there are.

    Args:
        file: JSON file of the settings; its folder is made where missing.
        settings: all that the content depends on, as JSON values.
        what: the content, for the error: `"codes of another extraction"`.

    Raises:
        ValueError: the file holds other settings; the message names each with its old and its new value.
    """
    file, settings = Path(file), json.loads(json.dumps(dict(settings)))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return
    changes = "; ".join(changes_of(read_json(file), settings))
    if changes:
        raise ValueError(f"{file.parent} holds {what}: {changes}. Give the same ones, or another folder.")


def changes_of(earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What differs between two records of settings, each with its old and its new value: "seed was 0 and is 1"."""
    old, new = (json.loads(json.dumps(dict(one))) for one in (earlier, settings))
    return [
        f"{name} was {reprlib.repr(old.get(name))} and is {reprlib.repr(new.get(name))}"
        for name in new | old
        if old.get(name) != new.get(name)
    ]


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Inside, no other process can enter this for the folder, which is made where missing.

    The lock belongs to the process and ends with it, however it ends. File systems that know no locks have none.

    Raises:
        ValueError: another process holds it; the message says which.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = Path(folder, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers, unlike flock
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ValueError(f"another run is writing to {folder}: {file.read().strip()}.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
