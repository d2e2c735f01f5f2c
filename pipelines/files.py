"""Writes files atomically, locks folders that only one process may write, and finds a folder for cached files."""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipelines.names import located, shortened, utf8
from pipelines.runtime import InputError, empty_path, shown

LARGEST_JSON = 1 << 28  # bytes; a manifest of a million classes has a tenth of it
_DEEPEST = 64  # levels of a JSON or TOML file; a recipe has four
_LARGEST_NUMBER = 1 << 64

_log = logging.getLogger("mvssl.data")
_TRIAL_BYTES = 1 << 20  # written to see whether a folder has room; with a full quota only empty files can be made
_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def given_path(value: str | os.PathLike[str], field: str) -> Path:
    """The path that a user gave for `field`; a `Url` if it is one.

    Raises:
        InputError: it is an empty text, which as a path would be the current folder.
    """
    if isinstance(value, str) and not value.strip():
        raise empty_path(field)
    return located(value)


def decode_text(data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 if a byte-order mark or zero bytes say so; lines end in ``\\n``.

    Bytes that are not UTF-8 become surrogates, as in file names. PowerShell writes UTF-16.

    Raises:
        UnicodeDecodeError: the text is damaged UTF-16 or UTF-32.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and len(data) > 1:
        start = data[:256]
        odd, even = start[1::2].count(0), start[::2].count(0)
        if 2 * max(odd, even) > len(start) // 2 > 2 * min(odd, even):
            encoding = "utf-16-le" if odd > even else "utf-16-be"
            with contextlib.suppress(UnicodeDecodeError):  # else it is no text at all
                return _unix_lines(data.decode(encoding))
            encoding = "utf-8"
    return _unix_lines(data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict"))


def _unix_lines(text: str) -> str:
    text = text.replace("\r\n", "\n")
    return text if "\n" in text else text.replace("\r", "\n")


def strict_text(data: bytes) -> str:
    """Text of a small file of the user's, as `decode_text`.

    Raises:
        InputError: it is in another encoding; the message names the line and wants the file in front.
    """
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        raise InputError(f"it begins as {error.encoding.upper()} but is damaged: save it as UTF-8.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if utf8(line) != line:
            raise InputError(
                f"line {number} is neither UTF-8 nor UTF-16 ({shortened(line, 100)}): save the file as UTF-8."
            )
    return text


def temporary_path(path: Path) -> Path:
    """Where `whole_file` writes the file before it is complete."""
    return path.with_name(f".{path.stem}.tmp{path.suffix}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: readers, kills and power cuts find the old file or the new one, never a part of it.

    Yields a temporary path in the same folder, with the same suffix, for the body to write to. It is then synced and
    renamed. If the body or the disk fails, it is removed and `path` is untouched.

    Raises:
        InputError: another process is writing this file.
        OSError: the file cannot be written; `filename` is set.
    """
    temporary = temporary_path(path)
    with locked(temporary, f"Another process is writing {path}: wait for it, or choose another place."):
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
    """Write `content` through `whole_file`; text is written as `utf8`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(utf8(content).encode() if isinstance(content, str) else content)


def read_regular(path: Path, *, most: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, or is a pipe, socket or device, whose data may never come or never end.
        ValueError: it has more than `most` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size:,} bytes, more than the allowed {most:,}")
        return file.read(size)


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, open for reading; OSError for a pipe, socket or device, whose data may never come or end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a pipe, socket or device and no regular file", str(path))


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON in UTF-8, is nested too deep, is larger than any file of ours, or has a number that
            no file of ours has (infinite, NaN, or above 2**64).
    """
    return parse_json(read_regular(path, most=LARGEST_JSON), numbers=True)


def parse_json(text: str | bytes, *, numbers: bool = False) -> Any:
    """The value of a JSON text; ValueError if it is none, is nested too deep, or (`numbers`) as in `read_json`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    check_nesting(value, numbers=numbers)
    return value


def check_nesting(value: Any, *, numbers: bool = False) -> None:
    """Check plain values from a file, so that other functions can recurse into them; with `numbers` these too.

    Raises:
        ValueError: they are nested too deep, or a number is not finite or too large.
    """
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below.extend(one.values())
            elif isinstance(one, list):
                below.extend(one)
            elif numbers and isinstance(one, (int, float)) and not abs(one) <= _LARGEST_NUMBER:
                raise ValueError(f"it has the number {shown(one)}, which no such file has")
        if not below:
            return
        level = below
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {_DEEPEST} levels")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Make the files in a folder durable, which others may still be writing, and their names."""
    for path in folder.iterdir():
        if path.is_file():
            with naming(path), path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


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
        descriptor = os.open(path, flags, 0o666)
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
    """The user's cache folder: ``$XDG_CACHE_HOME/mvssl``, else ``~/.cache/mvssl``, else one among the temporary files.

    It need not exist, and it may be unusable: `cache_folders` are for reading, `writable_cache` is for writing.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "mvssl"
    try:
        return Path.home() / ".cache" / "mvssl"
    except RuntimeError:  # no HOME, and a user id without a name: usual in containers
        return _temporary_cache()


def cache_folders(folder: Path) -> list[Path]:
    """Folders to look for cached files in: `folder`, and the temporary one if nobody else can write to it."""
    temporary = _temporary_cache()
    return [path for path in dict.fromkeys((folder, temporary)) if path != temporary or _is_private(path)]


def writable_cache(folder: Path, *, execute: bool = False) -> Path:
    """`folder`, or a temporary folder of this user alone if `folder` cannot be used, which is said once.

    Args:
        folder: the user's cache folder; created if need be.
        execute: libraries are to be loaded from it, which file systems can forbid.

    Raises:
        OSError: the temporary folder cannot be used either; the message says why.
    """
    obstacle = cache_obstacle(folder, execute=execute)
    if obstacle is None:
        return folder
    temporary = _temporary_cache()
    if temporary == folder or cache_obstacle(temporary, execute=execute) is not None:
        try:
            temporary = Path(_folder_of_process().name)
        except OSError as error:
            raise OSError(f"{obstacle}, and there is no temporary folder ({error.strerror or error})") from error
        if (second := cache_obstacle(temporary, execute=execute)) is not None:
            raise OSError(f"{obstacle}, and {second}")
    _announce(obstacle, temporary)
    return temporary


def cache_obstacle(folder: Path, *, execute: bool = False) -> str | None:
    """Why `folder` cannot hold cached files (with `execute`: libraries), or None; it is created if need be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder == _temporary_cache() and not _is_private(folder):
            return f"{folder} belongs to another user or can be written by others"
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
        forbidden = execute and os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0)
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"
    return f"{folder} is on a file system mounted noexec" if forbidden else None


def _temporary_cache() -> Path:
    """``mvssl-<uid>`` among the temporary files: the same for all processes of this user."""
    try:
        base = tempfile.gettempdir()
    except FileNotFoundError:  # no place for temporary files can be written
        base = "/tmp"
    return Path(base) / f"mvssl-{os.getuid()}"


@functools.cache
def _folder_of_process() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder of this process alone, where `_temporary_cache` cannot be used; removed at its end."""
    return tempfile.TemporaryDirectory(prefix=f"mvssl-{os.getuid()}-")


def _is_private(folder: Path) -> bool:
    """Whether a folder is this user's and no other's: what lies in it can be trusted. Links are not followed."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


@functools.cache
def _announce(obstacle: str, temporary: Path) -> None:
    """Warn once per host and reason that the cache is a temporary folder."""
    level = logging.WARNING if os.environ.get("LOCAL_RANK", "0") in ("", "0") else logging.DEBUG
    _log.log(
        level,
        "the cache folder %s: caching in %s, which may not last; set XDG_CACHE_HOME to a folder that can be written "
        "and executed from.",
        obstacle,
        temporary,
    )
