"""Converted data at a URL as a source: shards read in blocks or ranges ahead of use, with a cache on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.names import Url
from pipelines.runtime import InputError
from pipelines.storage.batch_read import RandomAccessFile, raise_file_limit, read_ranges
from pipelines.storage.block_cache import BlockCache
from pipelines.storage.manifest import MANIFEST, Manifest, Shard
from pipelines.storage.remote_files import Missing, Remote, RemoteOptions
from pipelines.storage.shards import ShardSource, damaged

_GAP = 1 << 16  # bytes between two images that are read along rather than asking twice
_MOST_AHEAD = 1 << 30  # bytes of images in memory that are to be read and not cached
_WHOLE_AT_ONCE = 2  # shards in memory
_SMALL_SHARD = 1 << 26  # bytes that may be sent for a single image
_AT_ONCE = 256  # images whose files are open together
_CHANGED = "put the same data back, or start a new run with the new data"


class RemoteShards(ShardSource):
    """Images in tar shards at a URL. Implements `Source`, `ReadsAhead` and `ReadsBatches`.

    The index is cached whole. Images are fetched in blocks of neighbours, which go into the cache, as many as it has
    room for: always the same ones, so that an epoch evicts nothing that the next one needs. Images of the other blocks
    are fetched by their ranges into memory when they are announced. Every image is compared with its checksum; if it
    differs, it is fetched once more, and then is a bad image. Order and content do not depend on the network.
    """

    location: Url

    def __init__(self, url: Url, options: RemoteOptions) -> None:
        self._connect(Remote(url, options), BlockCache(options.folder, options.cache_bytes), options)
        super().__init__(url)
        self._cache.durable = self.facts.checksums is None
        self._shards: Sequence[Shard] = self.manifest.shards
        self._set_blocks(options.block_bytes)

    def _connect(self, remote: Remote, cache: BlockCache, options: RemoteOptions) -> None:
        self._options, self._remote, self._cache = options, remote, cache
        self._lock = threading.Lock()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # (process, threads)
        self._fetching: dict[int, Future[bytes | None]] = {}  # by block
        self._ahead: dict[int, tuple[Future[bytes], int]] = {}  # image -> what it is in, and where that begins
        self._ahead_bytes = 0
        self._first_facts: dict[int, dict[str, str]] = {}  # by shard
        self._whole: dict[int, Future[bytes]] = {}  # shards on the way, from a server that sends nothing else
        self._whole_at_once = threading.Semaphore(_WHOLE_AT_ONCE)

    def _load_manifest(self) -> Manifest:
        return Manifest.load(self.location, text=self._remote.read(MANIFEST))

    def _check_shards(self) -> None:
        """Shards are checked when they are first read: some servers need a request for each."""

    def _content(self, name: str) -> bytes:
        expected = self.manifest.sha256.get(name, "")
        cached = f"index-{expected[:2]}/{expected}"

        def fetch() -> bytes:
            try:
                content = self._remote.read(name)
                if hashlib.sha256(content).hexdigest() != expected:
                    content = self._remote.read(name)
            except Missing as error:
                raise damaged(self.location / name, f"is missing ({error})") from error
            if hashlib.sha256(content).hexdigest() != expected:
                raise damaged(self.location / name, f"does not have the checksum in {MANIFEST}")
            return content

        for _ in range(2):
            fetched = self._cache.get(cached, fetch)
            content = self._cache.read(cached) if fetched is None else fetched
            if content is not None and hashlib.sha256(content).hexdigest() == expected:
                return content
            self._cache.drop(cached)
        return fetch()

    def _set_blocks(self, most: int) -> None:
        """Cut shards into blocks of whole images that begin in the same `most` bytes."""
        number = self._shard.astype(np.int64) * (1 << 40) + self._offset // most
        _, self._block = np.unique(number, return_inverse=True)  # [len]
        order = np.lexsort((self._offset, self._block))
        first = np.searchsorted(self._block[order], np.arange(int(self._block.max(initial=-1)) + 1))
        ends = (self._offset + self.nbytes)[order]
        self._members, self._first = order, np.append(first, len(order))
        self._block_start = self._offset[order][first]  # [blocks], in bytes
        self._block_end = np.maximum.reduceat(ends, first) if len(first) else ends
        self._block_shard = self._shard[order][first]
        self._cached = np.cumsum(self._block_end - self._block_start) <= self._cache.room  # bool [blocks]

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Encoded image: read-only uint8 [bytes]; fetched alone if its block is not cached.

        Raises:
            InputError: it cannot be fetched, or the data were changed.
        """
        found = self._from_cache(np.array([index]))[0]
        if found is None and self._remote.ignores_ranges:  # the rest of the shard comes too, and is cached
            found = self.read_batch([index])[0]
        return self._take(index) if found is None else found

    def read_batch(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """Encoded images; see `ReadsBatches`. Raises as `read`."""
        index = np.asarray(indices, dtype=np.int64)
        self._announce(index, limited=False)
        found: list[npt.NDArray[np.uint8] | None] = [None] * len(index)
        in_blocks = np.flatnonzero(self._in_blocks(index))
        for n, data in zip(in_blocks.tolist(), self._from_blocks(index[in_blocks]), strict=True):
            found[n] = data
        for n in range(len(index)):
            if found[n] is None:
                found[n] = self._take(int(index[n]))
        return found

    def will_need(self, indices: Sequence[int]) -> None:
        """Start fetching images that are not cached; returns at once."""
        self._announce(np.asarray(indices, dtype=np.int64), limited=True)

    def close(self) -> None:
        """End the fetching threads. Reading starts them again."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._fetching.clear()
            self._ahead.clear()
            self._ahead_bytes = 0
        if pool is not None and pool[0] == os.getpid():
            self._remote.closing.set()
            pool[1].shutdown(cancel_futures=True)
            self._remote.closing.clear()

    def verify(self, *, progress: Callable[[int], None] | None = None) -> None:
        """Read every shard and compare checksums; see `ShardSource`."""
        done = 0
        for number, shard in enumerate(self._shards):
            self._check_unchanged(number)
            digest = hashlib.sha256()
            for start in range(0, shard.bytes, self._options.block_bytes):
                end = min(start + self._options.block_bytes, shard.bytes)
                data = self._remote.read(shard.name, start, end)
                digest.update(data[start:end] if len(data) > end - start else data)
                done += end - start
                if progress is not None:
                    progress(done)
            if digest.hexdigest() != shard.sha256:
                raise damaged(self.location / shard.name, "does not have the checksum in the manifest")

    def _in_blocks(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which images are read in blocks."""
        return self._cached[self._block[index]] & self._cache.works

    def _announce(self, index: npt.NDArray[np.int64], *, limited: bool) -> None:
        """Start fetching; `limited`, only as much as there is memory for."""
        in_blocks = self._in_blocks(index)
        for block in np.unique(self._block[index[in_blocks]]).tolist():
            if not self._cache.path(self._block_name(block)).exists():
                self._start_block(block)
        self._announce_ranges(index[~in_blocks], limited=limited)

    def _start_block(self, block: int) -> None:
        """Fetch a block, if it is not on the way."""
        with self._lock:
            future = self._fetching.get(block)
            if future is None or (future.done() and future.exception() is None):  # evicted since
                future = self._threads().submit(
                    self._cache.get, self._block_name(block), lambda: self._block_data(block)
                )
                self._fetching[block] = future

    def _announce_ranges(self, index: npt.NDArray[np.int64], *, limited: bool) -> None:
        """Start fetching images into memory, neighbours in one request."""
        with self._lock:
            new = np.array([i for i in np.unique(index).tolist() if i not in self._ahead], dtype=np.int64)
            if not len(new):
                return
            start, end = self._offset[new], (self._offset + self.nbytes)[new]
            order = np.lexsort((start, self._shard[new]))
            new, start, end, shard = new[order], start[order], end[order], self._shard[new][order]
            runs: list[list[int]] = []  # positions in `new` of each request
            for n in range(len(new)):
                last = runs[-1] if runs else None
                joins = last is not None and shard[last[0]] == shard[n] and start[n] - end[last[-1]] <= _GAP
                if last is not None and joins and end[n] - start[last[0]] <= self._options.block_bytes:
                    last.append(n)
                else:
                    runs.append([n])
            for run in runs:
                first, size = int(start[run[0]]), int(end[run].max() - start[run[0]])
                if limited and self._ahead_bytes + size > _MOST_AHEAD:
                    return
                future = self._threads().submit(self._checked, int(shard[run[0]]), first, first + size, new[run])
                for n in run:
                    self._ahead[int(new[n])] = (future, first)
                    self._ahead_bytes += int(self.nbytes[new[n]])

    def _take(self, index: int) -> npt.NDArray[np.uint8]:
        """An image from memory, which it leaves; fetched now if it was not announced."""
        while True:
            with self._lock:
                held = self._ahead.pop(index, None)
                if held is not None:
                    self._ahead_bytes -= int(self.nbytes[index])
            if held is not None:
                data = held[0].result()
                at, size = int(self._offset[index]) - held[1], int(self.nbytes[index])
                return np.frombuffer(data, dtype=np.uint8, count=size, offset=at)
            self._announce_ranges(np.array([index]), limited=False)

    def _from_blocks(self, index: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8] | None]:
        """Images of blocks, which are waited for; None where the cache does not hold them after all."""
        blocks = self._block[index]
        unplaced: dict[int, bytes] = {}
        for block in np.unique(blocks).tolist():
            with self._lock:
                future = self._fetching.get(block)
            if future is None:
                continue
            try:
                data = future.result()
            finally:
                with self._lock:
                    self._fetching.pop(block, None)
            if data is not None:
                unplaced[block] = data
        found = self._from_cache(index)
        for n, block in enumerate(blocks.tolist()):
            if found[n] is None and block in unplaced:
                at = int(self._offset[index[n]] - self._block_start[block])
                found[n] = np.frombuffer(unplaced[block], np.uint8, count=int(self.nbytes[index[n]]), offset=at)
        return found

    def _from_cache(self, index: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8] | None]:
        """Images whose blocks are on disk; None for others. A block with a wrong image is fetched once more."""
        found: list[npt.NDArray[np.uint8] | None] = []
        for at in range(0, len(index), _AT_ONCE):
            some = index[at : at + _AT_ONCE]
            found.extend(self._from_files(some))
        for n, data in enumerate(found):
            i = int(index[n])
            if data is not None and not self._is_right(i, data.data):
                again = self._fetched_again(int(self._block[i]), i)
                found[n] = None if again is None else np.frombuffer(again, dtype=np.uint8)
        return found

    def _from_files(self, index: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8] | None]:
        """As `_from_cache`, of a few images, as they are."""
        files: dict[int, RandomAccessFile] = {}
        blocks = self._block[index]
        for block in np.unique(blocks).tolist():
            with contextlib.suppress(OSError):
                files[block] = RandomAccessFile(self._cache.path(self._block_name(block)))
                raise_file_limit(files[block].descriptor)
        here = [n for n, block in enumerate(blocks.tolist()) if block in files]
        offset, size = (self._offset[index] - self._block_start[blocks])[here], self.nbytes[index[here]]
        of = [files[int(block)] for block in blocks[here]]
        found: list[npt.NDArray[np.uint8] | None] = [None] * len(index)
        for n, data in enumerate(read_ranges([file.descriptor for file in of], offset, size)):
            with contextlib.suppress(OSError):
                again = data is None  # without a C compiler
                found[here[n]] = of[n].read(offset=int(offset[n]), size=int(size[n])) if again else data
        return found

    def _fetched_again(self, block: int, index: int) -> bytes | None:
        """An image of a block whose cached file is damaged."""
        self._cache.drop(self._block_name(block))
        data = self._cache.get(self._block_name(block), lambda: self._block_data(block))
        at = int(self._offset[index] - self._block_start[block])
        if data is None:
            data = self._cache.read(self._block_name(block))
        return None if data is None else data[at : at + int(self.nbytes[index])]

    def _all_right(self, data: bytes, start: int, members: npt.NDArray[np.int64]) -> bool:
        """Whether images in the bytes of a shard from `start` on have their checksums."""
        view = memoryview(data)
        places = [(i, int(self._offset[i]) - start, int(self.nbytes[i])) for i in members.tolist()]
        return all(self._is_right(i, view[at : at + size]) for i, at, size in places)

    def _is_right(self, index: int, data: bytes | memoryview) -> bool:
        sums = self.facts.checksums
        return sums is None or zlib.crc32(data) == sums[index]

    def _block_name(self, block: int) -> str:
        """Name of a block in the cache: what it is a part of by content, not by address."""
        shard = self._shards[int(self._block_shard[block])]
        return f"{shard.sha256[:40]}/{self._block_start[block]}-{self._block_end[block]}"

    def _block_data(self, block: int) -> bytes:
        shard, start, end = (int(x[block]) for x in (self._block_shard, self._block_start, self._block_end))
        return self._checked(shard, start, end, self._members_of(block))

    def _checked(self, number: int, start: int, end: int, members: npt.NDArray[np.int64]) -> bytes:
        """Bytes [start, end) of a shard, with `members` in them; fetched twice if a checksum is wrong.

        Raises:
            InputError: they cannot be fetched, or the shard was changed.
        """
        if number not in self._first_facts:
            self._check_unchanged(number)
        name, data = self._shards[number].name, b""
        for _ in range(2):
            try:
                data = self._part(number, start, end)
            except Missing as error:
                raise self._damaged(name, f"is missing or no longer to be read ({error})") from error
            except InputError:
                if not self._remote.closing.is_set():
                    with contextlib.suppress(Missing):
                        self._check_unchanged(number)
                raise
            right = self._all_right(data, start, members)
            if not right or self.facts.checksums is None:
                self._check_unchanged(number)
            if right:
                return data
        return data  # who reads it compares checksums again, and names the image

    def _part(self, number: int, start: int, end: int) -> bytes:
        """Bytes [start, end) of a shard, cut out of the whole shard if the server sends nothing else."""
        if not self._remote.ignores_ranges:
            data = self._remote.read(self._shards[number].name, start, end)
            return data if len(data) == end - start else self._kept(number, data)[start:end]
        with self._lock:
            future = self._whole.get(number)
            mine = future is None
            if future is None:
                future = self._whole[number] = Future()
        if mine:
            try:
                with self._whole_at_once:
                    future.set_result(self._kept(number, self._remote.read(self._shards[number].name)))
            except BaseException as error:
                future.set_exception(error)
            finally:
                with self._lock:
                    del self._whole[number]
        return future.result()[start:end]

    def _kept(self, number: int, data: bytes) -> bytes:
        """A whole shard that was sent, whose blocks are put into the cache."""
        shard = self._shards[number]
        url = self._url(shard.name)
        if len(data) != shard.bytes:
            raise self._damaged(shard.name, f"was changed: it has {len(data)} bytes but must have {shard.bytes}")
        blocks = np.flatnonzero(self._block_shard == number)
        if len(data) > _SMALL_SHARD and not (self._cache.works and self._cached[blocks].all()):
            raise InputError(
                f"{url} is sent as a whole of {len(data):,} bytes (the server ignores the header Range), which does "
                f"not fit into the cache of {self._options.cache_size} with the other shards: use a server with range "
                "requests, or raise --remote.cache-size."
            )
        for block in blocks[self._cached[blocks]].tolist() if self._cache.works else ():
            start, end = int(self._block_start[block]), int(self._block_end[block])
            if self._all_right(data, 0, self._members_of(block)):
                self._cache.offer(self._block_name(block), data[start:end])
        return data

    def _members_of(self, block: int) -> npt.NDArray[np.int64]:
        """The images of a block."""
        return self._members[self._first[block] : self._first[block + 1]]

    def _check_unchanged(self, number: int) -> None:
        """Compare what the server says of a shard with the manifest, and with what it said before.

        Raises:
            InputError: it is another object now.
        """
        shard = self._shards[number]
        url = self.location / shard.name
        try:
            facts = self._remote.facts(shard.name)
        except Missing as error:
            raise damaged(url, f"is missing or may not be read ({error})") from error
        size = facts.get("size", "")
        if size.isdigit() and int(size) != shard.bytes:
            raise damaged(url, f"was changed: it has {size} bytes but must have {shard.bytes}")
        first = self._first_facts.setdefault(number, facts)
        changed = [name for name in first if name in facts and first[name] != facts[name]]
        if changed:
            name = changed[0]
            raise InputError(
                f"{url} was changed while it was being read (its {name} was {first[name]} and is {facts[name]}): "
                f"{_CHANGED}."
            )

    def _url(self, name: str) -> Url:
        found: Url = self._remote.root / name
        return found

    def _damaged(self, name: str, problem: str) -> InputError:
        """The error of a shard that is not what it was."""
        return damaged(self._url(name), problem)

    def _threads(self) -> ThreadPoolExecutor:
        """The threads that fetch, of this process."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._fetching, self._ahead, self._ahead_bytes = {}, {}, 0  # of the parent, whose threads are not here
            self._pool = (os.getpid(), ThreadPoolExecutor(self._options.connections, thread_name_prefix="mvssl-fetch"))
        return self._pool[1]

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"{self.location} is open in this process: open it again in the other one")
