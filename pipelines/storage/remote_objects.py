"""Files at URLs (tars, zips, Parquet) read by offset like those on a disk, through the cache of blocks."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from pipelines.names import Url
from pipelines.runtime import InputError
from pipelines.storage.block_cache import BlockCache
from pipelines.storage.remote_files import Missing, Remote, RemoteOptions

_T = TypeVar("_T")
_VERSIONS = (
    "etag",
    "blob_id",
    "generation",
    "last_modified",
    "lastmodified",
    "mtime",
)  # what tells changes, best first
_RECENT = 1 << 28  # bytes of blocks in memory; at least two blocks are
_AHEAD = 1 << 26  # bytes fetched ahead of one that reads in order
_SMALL = 1 << 26  # bytes of a file that may be sent for a part of it
_SUM = 4  # bytes of the checksum behind a cached block


class RemoteObject(Url):
    """The URL of a file, and how it is read: `stat` and `open` work, other methods of paths do not.

    Attributes:
        store: reads it; None of paths derived from it.
        size: bytes.
        version: ETag or what else the server says of its content; "" if it says nothing.
        first: bytes of the files before it in the same data set.
    """

    store: RemoteObjects | None = None
    size = 0
    version = ""
    first = 0

    @property
    def plain(self) -> str:
        """The URL without the signature that some have in a query."""
        return str(self).partition("?")[0]

    @property
    def identity(self) -> str:
        """Hash of URL, size and version, in hex digits."""
        return hashlib.sha256(f"{self.plain}\0{self.size}\0{self.version}".encode()).hexdigest()

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Its size, and as modification time a number that is another one if its content is."""
        del follow_symlinks
        if self.store is None:
            raise FileNotFoundError(str(self))
        number = int(self.identity[:14], 16)  # below 2**56: a time long ago, as of files that have settled
        return os.stat_result((stat.S_IFREG, 0, 0, 0, 0, 0, self.size, 0, 0, 0), {"st_mtime_ns": number})

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer at the end. Raises InputError if they cannot be fetched, or it was changed."""
        if self.store is None:
            raise FileNotFoundError(str(self))
        return self.store.read(self, offset, size)

    def reader(self) -> io.BufferedReader:
        """The bytes as an open file."""
        return io.BufferedReader(_Reader(self))

    def release(self) -> None:
        """End the threads that fetch, which reading starts again."""
        if self.store is not None:
            self.store.close()

    def will_need(self, start: int, end: int) -> None:
        """Start fetching bytes [start, end)."""
        if self.store is not None:
            self.store.start(self, start, min(end, self.size))


class _Reader(io.RawIOBase):
    """An open file of a `RemoteObject`."""

    def __init__(self, path: RemoteObject) -> None:
        self._path, self._at = path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._path.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._path.read_at(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class RemoteObjects:
    """The files of a data set below a URL. Thread-safe; fetches with new threads after a fork.

    Each block is fetched by one process of a host, as long as the cache has room for the data set; the first files go
    into it, and blocks of the others stay in memory for a while.
    """

    def __init__(self, root: Url, options: RemoteOptions) -> None:
        self.root, self.options = root, options
        self.remote = Remote(root, options)
        self.cache = BlockCache(options.folder, options.cache_bytes)
        self._block = options.block_bytes
        self._lock, self._whole = threading.Lock(), threading.Lock()
        self._recent: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._fetching: dict[tuple[str, int], Future[bytes]] = {}
        self._last: dict[str, int] = {}  # block read last, by file
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # (process, threads)

    def at_once(self, function: Callable[[str], _T], names: Iterable[str]) -> list[_T]:
        """Results of requests that do not wait for others, in order."""
        return list(self._threads().map(function, names))

    def objects(self, names: Sequence[str], known: dict[str, dict[str, str]]) -> list[RemoteObject]:
        """Files by name below the root, with the facts that are `known` of them, or else asked for.

        Raises:
            Missing: one does not exist.
            InputError: the server does not say how large it is.
        """

        def facts_of(name: str) -> dict[str, str]:
            facts = known.get(name, {})
            return facts if version_of(facts) and facts.get("size", "").isdigit() else self.remote.facts(name)

        found, first = [], 0
        for name, facts in zip(names, self.at_once(facts_of, names), strict=True):
            one = RemoteObject(f"{self.root.scheme}:/{str(self.root / name).partition('://')[2]}")
            if not facts.get("size", "").isdigit():
                raise InputError(
                    f"{one} is sent without its size (compressed on the way, or made while it is sent), but must be a "
                    "file that can be read in parts: serve it as it is, or download it."
                )
            one.store, one.size, one.version, one.first = self, int(facts["size"]), version_of(facts), first
            first += one.size
            found.append(one)
        return found

    def heads(self, paths: Sequence[RemoteObject], size: int) -> list[bytes]:
        """The first bytes of files."""

        def head(number: str) -> bytes:
            path = paths[int(number)]
            if not path.size:
                return b""
            length = min(size, path.size)
            return self._through_cache(
                f"head-{path.identity[:2]}/{path.identity}", length, lambda: self._checked(path, 0, length), keep=True
            )

        return self.at_once(head, map(str, range(len(paths))))

    def read(self, path: RemoteObject, offset: int, size: int) -> bytes:
        """See `RemoteObject.read_at`."""
        end = min(offset + size, path.size)
        if end <= offset:
            return b""
        first, last = offset // self._block, (end - 1) // self._block
        name = str(path)
        previous = self._last.get(name, -1)
        self._last[name] = last
        if first == previous + 1 and first:  # reads in order
            count = max(1, min(self.options.connections, _AHEAD // self._block))
            self.start(path, first * self._block, min((last + 1 + count) * self._block, path.size))
        elif last > first:
            self.start(path, offset, end)
        pieces = []
        for block in range(first, last + 1):
            data, start = self._data(path, block), block * self._block
            pieces.append(data[max(0, offset - start) : end - start])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def start(self, path: RemoteObject, start: int, end: int) -> None:
        """Start fetching the blocks of bytes [start, end); returns at once."""
        for block in range(start // self._block, -(-end // self._block)):
            self._future(path, block)

    def cached(self, path: RemoteObject, start: int, end: int) -> bytes | None:
        """Bytes [start, end), if all of their blocks are in the cache."""
        blocks = range(start // self._block, -(-end // self._block))
        if not self.cache.works or not all(self.cache.path(self._name(path, block)).exists() for block in blocks):
            return None
        return self.read(path, start, end - start)

    def close(self) -> None:
        """End the fetching threads, and forget what is in memory."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._fetching.clear()
            self._recent.clear()
        if pool is not None and pool[0] == os.getpid():
            self.remote.closing.set()
            pool[1].shutdown(cancel_futures=True)
            self.remote.closing.clear()

    def _name(self, path: RemoteObject, block: int) -> str:
        return f"file-{path.identity[:40]}/{self._block}-{block}"

    def _data(self, path: RemoteObject, block: int) -> bytes:
        key = (str(path), block)
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
        try:
            return self._future(path, block).result()
        finally:
            with self._lock:
                self._fetching.pop(key, None)

    def _future(self, path: RemoteObject, block: int) -> Future[bytes]:
        """A block that is here or on the way."""
        key = (str(path), block)
        with self._lock:
            threads = self._threads()
            here = self._recent.get(key)
            if here is not None:
                done: Future[bytes] = Future()
                done.set_result(here)
                return done
            future = self._fetching.get(key)
            if future is None or (future.done() and future.exception() is not None):  # the fault may have passed
                future = self._fetching[key] = threads.submit(self._load, path, block)
            return future

    def _load(self, path: RemoteObject, block: int) -> bytes:
        start = block * self._block
        end = min(start + self._block, path.size)
        keep = path.first + end <= self.cache.room
        data = self._through_cache(
            self._name(path, block), end - start, lambda: self._checked(path, start, end), keep=keep
        )
        self._remember((str(path), block), data)
        return data

    def _remember(self, key: tuple[str, int], data: bytes) -> None:
        with self._lock:
            self._recent[key] = data
            while len(self._recent) > 2 and len(self._recent) * self._block > _RECENT:
                self._recent.popitem(last=False)
            self._fetching.pop(key, None)

    def _through_cache(self, name: str, size: int, fetch: Callable[[], bytes], *, keep: bool) -> bytes:
        """Some bytes from the cache, or fetched and put there; a damaged file in it is fetched again."""
        if not keep:
            return fetch()
        for _ in range(2):
            held: list[bytes] = []

            def fetched(held: list[bytes] = held) -> bytes:
                held.append(fetch())
                return held[0] + _sum(held[0])

            found = self.cache.get(name, fetched)
            if held:
                return held[0]
            found = self.cache.read(name) if found is None else found
            if found is not None and len(found) == size + _SUM and found[size:] == _sum(found[:size]):
                return found[:size]
            self.cache.drop(name)
        return fetch()

    def _checked(self, path: RemoteObject, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, which is still as it was."""
        try:
            try:
                data = self._part(path, start, end)
            finally:  # an answer of another length is a change, too
                if not self.remote.closing.is_set():
                    self.check_unchanged(path)
        except Missing as error:
            raise changed(path, f"is missing or no longer to be read ({error})") from error
        return data

    def _part(self, path: RemoteObject, start: int, end: int) -> bytes:
        name = str(path)[len(str(self.root)) + 1 :]
        if not self.remote.ignores_ranges:
            data = self.remote.read(name, start, end)
            if len(data) == end - start:
                return data
            return self._kept(path, data)[start:end]
        with self._whole:  # a file at a time, of which others find their blocks
            with self._lock:
                here = self._recent.get((str(path), start // self._block))
            if here is not None:
                return here[: end - start]
            return self._kept(path, self.remote.read(name))[start:end]

    def _kept(self, path: RemoteObject, data: bytes) -> bytes:
        """A whole file that was sent instead of a part, whose blocks are kept."""
        if len(data) != path.size:
            raise changed(path, f"has {len(data):,} bytes and not {path.size:,}")
        fits = self.cache.works and path.first + path.size <= self.cache.room
        if path.size > _SMALL and not fits:
            raise InputError(
                f"{path} is sent as a whole of {path.size:,} bytes (the server ignores the header Range), which does "
                f"not fit into the cache of {self.options.cache_size} with the other files: use a server with range "
                "requests, raise --remote.cache-size, or download it."
            )
        for block, start in enumerate(range(0, path.size, self._block)):
            piece = data[start : start + self._block]
            if fits:
                self.cache.offer(self._name(path, block), piece + _sum(piece))
            self._remember((str(path), block), piece)
        return data

    def check_unchanged(self, path: RemoteObject) -> None:
        """Ask for size and version again, and raise InputError if they changed; hubs allow too few requests."""
        if self.root.scheme == "hf" or not path.version:
            return
        facts = self.remote.facts(str(path)[len(str(self.root)) + 1 :])
        size, version = facts.get("size", ""), version_of(facts)
        if size.isdigit() and int(size) != path.size:
            raise changed(path, f"has {size} bytes and not {path.size:,}")
        if version and version != path.version:
            raise changed(path, f"was {path.version} and is {version}")

    def _threads(self) -> ThreadPoolExecutor:
        """The threads that fetch, of this process."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._fetching = {}
            self._pool = (os.getpid(), ThreadPoolExecutor(self.options.connections, thread_name_prefix="mvssl-fetch"))
        return self._pool[1]

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"{self.root} is open in this process: open it again in the other one")


def version_of(facts: dict[str, str]) -> str:
    """What tells one content of a file from another, such as its ETag; "" if the server says nothing."""
    name = next((name for name in _VERSIONS if facts.get(name)), None)
    return "" if name is None else f"{name} {facts[name].removeprefix('W/').strip(chr(34))}"


def changed(path: Url, why: str) -> InputError:
    """The error for a file at a URL that is another one than when it was indexed."""
    return InputError(
        f"{path} was changed since it was indexed (it {why}): put the same file back, or start a new run with the new "
        "data."
    )


def _sum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_SUM, "little")
