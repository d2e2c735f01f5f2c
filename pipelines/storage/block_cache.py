"""A cache of bounded size on disk: blocks of remote files, each fetched by one process of a host for all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_log = logging.getLogger("mvssl.data")
_ROOM = 0.95  # of the cache that one data set takes; evicting goes down to it
_PART = ".part"  # suffix of a file that is being fetched


class BlockCache:
    """Files of a bounded total size in a folder, each fetched by one of the processes that want it.

    A file has its name only when it is complete, and a process that dies leaves at most a part that the next one
    writes again. A folder that cannot be written is named once; data are then read without a cache.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = folder
        self._most = most
        self._scanned = False
        self.durable = False
        """Whether files are synced before they get their names: for those whose content nothing else can check."""
        self.works = most > 0
        """False once the folder cannot be written."""

    @property
    def room(self) -> int:
        """Bytes that a data set may keep here without evicting its own."""
        return int(_ROOM * self._most)

    def path(self, name: str) -> Path:
        """Where the file is, if it is cached."""
        return self._folder / name

    def get(self, name: str, fetch: Callable[[], bytes]) -> bytes | None:
        """Fetch the file if no process has; None if it is in the folder now, else its content, which found no place."""
        if not self.works:
            return fetch()
        path = self.path(name)
        part = path.with_name(path.name + _PART)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                with _waiting_lock(part) as descriptor:
                    if path.exists():
                        with contextlib.suppress(OSError):
                            part.unlink()
                            os.utime(path)
                        return None
                    if not _is_named(descriptor, part):
                        continue
                    return self._fill(path, part, descriptor, fetch)
        except OSError as error:
            self._give_up(error)
            return fetch()

    def offer(self, name: str, data: bytes) -> None:
        """Keep a file that has come along, unless it is here or another process is fetching it."""
        path = self.path(name)
        part = path.with_name(path.name + _PART)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _waiting_lock(part, wait=False) as descriptor:
                if path.exists():
                    part.unlink()
                elif _is_named(descriptor, part):
                    self._fill(path, part, descriptor, lambda: data)
        except BlockingIOError:
            return
        except OSError as error:
            self._give_up(error)

    def drop(self, name: str) -> None:
        """Remove a file whose content is wrong."""
        with contextlib.suppress(OSError):
            self.path(name).unlink()

    def read(self, name: str) -> bytes | None:
        """Content of a cached file; None if it is not here."""
        try:
            return self.path(name).read_bytes()
        except OSError:
            return None

    def _fill(self, path: Path, part: Path, descriptor: int, fetch: Callable[[], bytes]) -> bytes | None:
        """Fetch and write a file whose lock is held."""
        try:
            data = fetch()
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        try:
            if len(data) > self.room:
                part.unlink()
                return data
            with self._room_for(len(data)):
                os.ftruncate(descriptor, 0)
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                if self.durable:
                    os.fsync(descriptor)
                part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            self._give_up(error)
            return data
        return None

    def _give_up(self, error: OSError) -> None:
        if self.works:
            self.works = False
            level = logging.WARNING if os.environ.get("LOCAL_RANK", "0") in ("", "0") else logging.DEBUG
            _log.log(
                level,
                "the cache folder %s cannot be written (%s): remote images are read without a cache; choose another "
                "folder with --remote.cache, or a smaller --remote.cache-size.",
                self._folder,
                error.strerror or error,
            )

    @contextlib.contextmanager
    def _room_for(self, count: int) -> Iterator[None]:
        """Evict the least recently used files until there is room for `count` bytes, and let no other process write."""
        with _waiting_lock(self._folder / "used") as descriptor:
            text = os.pread(descriptor, 32, 0)
            used = int(text) if text.isdigit() else -1
            if used < 0 or not self._scanned or used + count > self._most:
                used = self._evict(count)
                self._scanned = True
            yield
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(used + count).encode(), 0)

    def _evict(self, count: int) -> int:
        """Bytes in the folder after evicting."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        if used + count > self._most:
            for _, size, path in files:
                if used + count <= self.room:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                used -= size
        return used

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """(time of last use, bytes, path) of the cached files."""
        with os.scandir(self._folder) as entries:
            folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for folder in folders:
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        if not entry.name.endswith(_PART) or found.st_size:
                            yield found.st_mtime, found.st_size, entry.path


@contextlib.contextmanager
def _waiting_lock(path: Path, *, wait: bool = True) -> Iterator[int]:
    """A file, created if need be and open for writing, under an exclusive lock; without `wait`, BlockingIOError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):  # a file system without locks
                raise
        yield descriptor
    finally:
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name, which the previous holder of its lock may have taken away."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
