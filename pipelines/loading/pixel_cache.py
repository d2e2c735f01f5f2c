"""Pixel cache (`--cache`): decoded images of a whole data set in one buffer, filled as images are first used."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import DecodedBatch
from pipelines.decode.limits import beyond_pixels
from pipelines.decode.pillow import open_image
from pipelines.decode.sniff import sniff
from pipelines.loading import Cache
from pipelines.runtime import InputError, invalid
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import ReadsAhead, ReadsBatches, Source

CHOICES: tuple[Cache, ...] = get_args(Cache)
AUTO_FRACTION = {"device": 0.4, "host": 0.5}
"""Fraction of free memory that `auto` takes at most: evaluations and other programs need the rest."""
MAX_FRACTION = 0.9
"""Fraction of free memory that `host` or `device` may take, and of what training steps leave of a GPU's."""
_READERS = 8
_CHUNK = 1000  # images per progress report
_GB = 1e9

_log = logging.getLogger("mvssl.data")
_REPORTS = 4  # progress messages while the cache fills

cuda: Any = torch.cuda  # Any: torch ships its streams and events without types


class PixelCache:
    """Pixels of images by dataset index; thread-safe.

    Attributes:
        nbytes: size of the whole buffer.
    """

    def __init__(self, sizes: NDArray[np.int64], *, device: torch.device, on: torch.device) -> None:
        """Allocate the buffer.

        Args:
            sizes: int64 [len], bytes of each image's pixels; 0 for an image that is not cached.
            device: of the buffer: that of the views, or the CPU.
            on: where the views are made; pixels on another device are copied into one pinned buffer for upload.

        Raises:
            torch.OutOfMemoryError, RuntimeError, MemoryError: memory is full.
        """
        ends = np.cumsum(sizes)
        self.nbytes = int(ends[-1]) if len(ends) else 0
        self._expected = sizes
        self._offset = torch.from_numpy(ends - sizes)  # int64 [len]
        self._sizes = torch.zeros((len(sizes), 2), dtype=torch.int64)  # (height, width), once cached
        self._cached = np.zeros(len(sizes), dtype=bool)
        self._uploads = device.type != on.type
        # Not pinned: torch would round up to a power of two. `batch` pins what is uploaded.
        self._pixels = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        self._lock = threading.Lock()
        self._cached_bytes = self._reported = 0
        self._written: dict[int, Any] = {}  # CUDA event after the last write of each stream
        self._changed: set[int] = set()  # images whose size is not the expected one

    def __contains__(self, index: int) -> bool:
        return bool(self._cached[index])

    def add(self, batch: DecodedBatch) -> None:
        """Cache the images of a batch that have the expected sizes."""
        with self._lock:
            places: list[torch.Tensor] = []
            images: list[torch.Tensor] = []
            for n, index in enumerate(batch.index.tolist()):
                height, width = batch.sizes[n].tolist()
                room = int(self._expected[index])
                if self._cached[index] or index in self._changed:
                    continue
                if 3 * height * width != room:
                    self._changed.add(index)
                    if room:
                        _log.warning("An image file changed during the run: it is decoded at every use.")
                    continue
                start = int(self._offset[index])
                places.append(self._pixels[start : start + room].view(height, width, 3))
                images.append(batch.image(n).to(self._pixels.device))
                self._sizes[index] = batch.sizes[n]
                self._cached[index] = True
                self._cached_bytes += room
            if places:
                torch._foreach_copy_(places, images)
                if self._pixels.is_cuda:
                    stream, event = cuda.current_stream(self._pixels.device), cuda.Event()
                    event.record(stream)
                    self._written[stream.cuda_stream] = event
        self._report()

    def batch(self, indices: Sequence[int], labels: NDArray[np.int64]) -> DecodedBatch:
        """The images of these dataset indices, all of which must be cached; `labels` is int64 [N]."""
        index = torch.tensor(indices, dtype=torch.int64)
        with self._lock:
            offset, sizes = self._offset[index], self._sizes[index]
            for event in self._written.values():
                cuda.current_stream(self._pixels.device).wait_event(event)
        pixels = self._pixels
        if self._uploads:
            lengths = (sizes.prod(dim=1) * 3).tolist()
            parts = [pixels[at : at + length] for at, length in zip(offset.tolist(), lengths, strict=True)]
            pixels = torch.empty(sum(lengths), dtype=torch.uint8, pin_memory=True)
            torch.cat(parts, out=pixels)
            return DecodedBatch.packed(pixels, sizes=sizes, index=index, labels=torch.from_numpy(labels))
        return DecodedBatch(
            pixels=pixels,
            offset=offset,
            sizes=sizes,
            row_stride=sizes[:, 1] * 3,
            index=index,
            labels=torch.from_numpy(labels),
        )

    def _report(self) -> None:
        """Log at every quarter how much is cached."""
        mark = _REPORTS * self._cached_bytes // self.nbytes if self.nbytes else 0
        if mark > self._reported:
            self._reported = mark
            _log.info("cache: %d %% of the images are cached", 100 * self._cached_bytes // self.nbytes)


class CachedSource:
    """A source with a pixel cache."""

    def __init__(self, source: Source, cache: PixelCache) -> None:
        self.cache = cache
        self._source = source
        self.labels, self.classes, self.nbytes = source.labels, source.classes, source.nbytes
        self.fingerprint, self.location = source.fingerprint, source.location
        self.facts = facts_of(source)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> NDArray[np.uint8]:
        """As the source."""
        return self._source.read(index)

    def read_batch(self, indices: Sequence[int]) -> list[NDArray[np.uint8] | None]:
        """As the source."""
        source = self._source
        return source.read_batch(indices) if isinstance(source, ReadsBatches) else [None] * len(indices)

    def key(self, index: int) -> str:
        """As the source."""
        return self._source.key(index)

    def will_need(self, indices: Sequence[int]) -> None:
        """As the source, for images that are not cached yet."""
        missing = [index for index in indices if index not in self.cache]
        if missing and isinstance(self._source, ReadsAhead):
            self._source.will_need(missing)

    def close(self) -> None:
        """As the source."""
        self._source.close()


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """Free memory in bytes.

    Attributes:
        host: of the machine, per process.
        device: of the GPU; 0 without one.
        steps: GPU memory that training steps will take.
    """

    host: int
    device: int = 0
    steps: int = 0

    def of(self, place: str) -> int:
        """Free bytes of "host" or "device"."""
        return self.host if place == "host" else self.device

    def budget(self, place: str, choice: Cache) -> int:
        """Bytes that cached pixels may take there."""
        left = self.of(place) - (self.steps if place == "device" else 0)
        limit = int(MAX_FRACTION * max(0, left))
        return min(limit, int(AUTO_FRACTION[place] * self.of(place))) if choice == "auto" else limit


def free_memory(device: torch.device, *, processes: int) -> FreeMemory:
    """Free memory, within the limit of a container."""
    free = [_available()]
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free.append(max(0, limit - used))
    on_gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return FreeMemory(host=min(free) // processes, device=on_gpu)


def with_cache(
    source: Source,
    choice: Cache,
    *,
    device: torch.device,
    memory: FreeMemory,
    progress: Callable[[int], None] | None = None,
) -> tuple[Source, str]:
    """A source with a pixel cache, or the source itself; and a sentence on the choice ("" for off).

    Every process caches all images, since each image reaches every process sooner or later.

    Args:
        source: the encoded images.
        choice: where to cache; auto takes GPU memory, else host memory, else none, within `AUTO_FRACTION`.
        device: where the views are made.
        memory: free memory.
        progress: called with the number of images whose size is known.

    Raises:
        InputError: the requested memory is too small or does not exist.
    """
    if choice not in CHOICES:
        raise invalid("cache", choice, f"one of {', '.join(CHOICES)}", "choose one of these")
    if choice == "off":
        return source, ""
    if choice == "device" and device.type != "cuda":
        raise InputError(
            f"cache is 'device' but must be off, host or auto on a {device.type} device, which has no memory of its "
            "own: take host.",
            field="cache",
        )
    places = [choice] if choice != "auto" else ["device", "host"] if device.type == "cuda" else ["host"]
    budget = {place: memory.budget(place, choice) for place in places}
    least = int(source.nbytes.sum())  # decoded images are larger than encoded ones
    if least > max(budget.values()):
        return source, _does_not_fit(choice, least, f"more than {_gb(least)}", budget, memory)
    sizes = pixel_bytes(source, progress=progress)
    needed = int(sizes.sum())
    fitting = [place for place in places if needed <= budget[place]]
    if not fitting:
        return source, _does_not_fit(choice, needed, _gb(needed), budget, memory)
    return _allocated(source, sizes, fitting, device)


def _allocated(source: Source, sizes: NDArray[np.int64], places: list[str], device: torch.device) -> tuple[Source, str]:
    """Allocate the cache in the first memory with room; the source itself if none has."""
    needed, failures = _gb(int(sizes.sum())), []
    for place in places:
        where = device if place == "device" else torch.device("cpu")
        try:
            cache = PixelCache(sizes, device=where, on=device)
        except (RuntimeError, MemoryError) as error:
            failures.append(f"{_memory_name(place)} memory had no room for {needed} ({_first_line(error)})")
            continue
        sentence = f"cache: {needed} of pixels in {_memory_name(place)} memory; each image is decoded once"
        return CachedSource(source, cache), "; ".join([sentence, *failures])
    return source, f"cache: OFF, images are decoded at every use: {'; '.join(failures)}"


def _does_not_fit(choice: Cache, needed: int, amount: str, budget: dict[str, int], memory: FreeMemory) -> str:
    """Why nothing is cached; raises if a cache was requested."""
    allowed = " and ".join(
        f"{_gb(budget[place])} of {_gb(memory.of(place))} free {_memory_name(place)} memory" for place in budget
    )
    if memory.steps and "device" in budget:
        allowed += f" ({_gb(memory.steps)} of GPU memory are for training steps)"
    if choice == "auto":
        return f"cache: off, because the pixels of all images take {amount}, and at most {allowed} are taken"
    other: Cache = "host" if choice == "device" else "device"
    fits = needed <= memory.budget(other, other)
    remedy = f"take --cache {other} ({_gb(memory.of(other))} free), or " if fits else "take "
    raise InputError(
        f"cache is {choice!r} but the pixels of all images take {amount} and at most {allowed} can be taken: {remedy}"
        "--cache off, or convert the images with mvssl-convert --max-size, which makes them smaller.",
        field="cache",
    )


def pixel_bytes(source: Source, *, progress: Callable[[int], None] | None = None) -> NDArray[np.int64]:
    """Decoded size of each image in bytes, from its header: int64 [len]; 0 if unknown or too large.

    Reads every file once; the first epoch then finds them in the page cache.
    """
    sizes = np.zeros(len(source), dtype=np.int64)
    share = max(1, min(_CHUNK, -(-len(source) // _READERS)))
    parts = [range(at, min(at + share, len(source))) for at in range(0, len(source), share)]

    def measure(part: range) -> int:
        for index, pixels in _pixel_counts(source, part):
            sizes[index] = 3 * pixels
        return len(part)

    done = 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="mvssl-sizes") as pool:
        for count in pool.map(measure, parts):
            done += count
            if progress is not None:
                progress(done)
    return sizes


def _pixel_counts(source: Source, indices: range) -> Iterator[tuple[int, int]]:
    """Each index with its number of pixels, as far as the files tell and the limits allow."""
    limits = facts_of(source).limits
    for index in indices:
        try:
            data = source.read(index)
        except OSError:  # the fetcher names it
            continue
        header = sniff(data)
        if header is None:
            try:
                with open_image(data, limits) as image:
                    width, height = image.size
            except Exception:  # Pillow raises many types on broken files, which the decoder names
                continue
        else:
            width, height = header.width, header.height
        if not beyond_pixels(width, height, limits):
            yield index, width * height


def _available() -> int:
    """MemAvailable of /proc/meminfo in bytes; the address space where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 2**62)


def _number(path: Path) -> int | None:
    """The number in a file; None if it holds none ("max")."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _memory_name(place: str) -> str:
    return "GPU" if place == "device" else "host"


def _gb(count: int) -> str:
    return f"{count / _GB:.2f} GB" if count >= _GB / 100 else f"{count / 1e6:.2f} MB"


def _first_line(error: BaseException) -> str:
    """The first line of a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
