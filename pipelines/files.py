"""Writes files atomically, locks folders that only one process may write, and names the user's cache folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.runtime import InputError


def temporary_path(path: Path) -> Path:
    """Where `whole_file` writes the file before it is complete."""
    return path.with_name(f".{path.stem}.tmp{path.suffix}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: readers, kills and power cuts find the old file or the new one, never a part of it.

    Yields a temporary path in the same folder, with the same suffix, for the body to write to. It is then synced and
    renamed. If the body or the disk fails, it is removed and `path` is untouched.

    Raises:
        OSError: the file cannot be written; `filename` is set.
    """
    temporary = temporary_path(path)
    try:
        with naming(temporary):
            yield temporary
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Sync a complete file and rename it to `path`, durably."""
    with naming(temporary):
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    sync_folder(path.parent)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write `content` through `whole_file`; text is UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in operating-system errors that name no file (a full disk on write, fsync)."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def locked(path: Path, otherwise: str) -> Iterator[None]:
    """Hold an exclusive lock on an existing folder, or on a file that is created if need be.

    The system releases the lock when the process ends, even by a kill. File systems without locks admit every process.

    Args:
        path: the folder or file.
        otherwise: message of the error if another process holds the lock.

    Raises:
        InputError: another process holds the lock.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    while True:
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise InputError(otherwise) from error
        except OSError:  # some network file systems have no locks
            break
        if _is_same_file(descriptor, path):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    """False if the previous holder of the lock removed the file between our opening and locking it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mvssl``, else ``~/.cache/mvssl``, else ``mvssl-<uid>`` among the temporary files.

    It need not exist.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "mvssl"
    try:
        return Path.home() / ".cache" / "mvssl"
    except RuntimeError:  # no HOME, and a user id without a name: usual in containers
        return Path(tempfile.gettempdir()) / f"mvssl-{os.getuid()}"
