"""Write files so that they are either whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give operating-system errors that name no file (a full disk while writing) the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def temporary_name(path: Path) -> Path:
    """The name a file has until it is whole."""
    return path.with_name(path.name + ".tmp")


def rename_into_place(path: Path) -> None:
    """Give a whole, synced temporary file its name, so that it also survives a power cut."""
    temporary_name(path).replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`: temporary name, fsync, rename.

    Raises:
        OSError: it cannot be written; the temporary file is removed.
    """
    temporary = temporary_name(path)
    try:
        with naming(temporary), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    rename_into_place(path)
