"""Decoded images kept: one buffer for the pixels of a whole data set, filled as its images are first used.

--cache: whether a data set's decoded images are kept, and where, worked out before anything is decoded.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.batch import DecodedBatch
from pipelines.decode.base import MAX_PIXELS
from pipelines.decode.sniff import sniff
from pipelines.runtime import InputError, invalid
from pipelines.storage.source import ReadsAhead, ReadsTogether, Source

_log = logging.getLogger("mvssl.data")
_MARKS = 4  # times that the filling is said

cuda: Any = torch.cuda  # Any: torch ships its streams and events without types


class PixelStore:
    """The pixels of images by their dataset index. Safe for several threads.

    Attributes:
        nbytes: of the whole buffer.
    """

    def __init__(self, sizes: NDArray[np.int64], *, device: torch.device, on: torch.device) -> None:
        """Reserve the memory.

        Args:
            sizes: int64 [len], bytes of each image's pixels; 0 for one that is not to be kept.
            device: where the pixels lie: that of the views, or the CPU.
            on: where the views are made; pixels that lie elsewhere are copied into one piece that is quick to upload.

        Raises:
            torch.OutOfMemoryError, RuntimeError, MemoryError: there is not so much.
        """
        ends = np.cumsum(sizes)
        self.nbytes = int(ends[-1]) if len(ends) else 0
        self._room = sizes
        self._offset = torch.from_numpy(ends - sizes)  # int64 [len]
        self._sizes = torch.zeros((len(sizes), 2), dtype=torch.int64)  # (height, width), once it is there
        self._there = np.zeros(len(sizes), dtype=bool)
        self._moves = device.type != on.type
        # Not pinned: torch would take the next power of two of bytes, all at once. `batch` pins what is uploaded.
        self._pixels = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        self._lock = threading.Lock()
        self._kept = self._said = 0  # bytes, and marks of the filling that were said
        self._written: dict[int, Any] = {}  # CUDA event behind the last writing of each stream
        self._odd: set[int] = set()

    def __contains__(self, index: int) -> bool:
        return bool(self._there[index])

    def add(self, batch: DecodedBatch) -> None:
        """Keep the images of a batch, as far as they have the sizes that room was made for."""
        with self._lock:
            places: list[torch.Tensor] = []
            images: list[torch.Tensor] = []
            for n, index in enumerate(batch.index.tolist()):
                height, width = batch.sizes[n].tolist()
                room = int(self._room[index])
                if self._there[index] or index in self._odd:
                    continue
                if 3 * height * width != room:
                    self._odd.add(index)
                    if room:
                        _log.warning("An image was changed while the data was being read: it is decoded at every use.")
                    continue
                start = int(self._offset[index])
                places.append(self._pixels[start : start + room].view(height, width, 3))
                images.append(batch.image(n).to(self._pixels.device))
                self._sizes[index] = batch.sizes[n]
                self._there[index] = True
                self._kept += room
            if places:
                torch._foreach_copy_(places, images)
                if self._pixels.is_cuda:
                    stream, event = cuda.current_stream(self._pixels.device), cuda.Event()
                    event.record(stream)
                    self._written[stream.cuda_stream] = event
        self._say()

    def batch(self, indices: Sequence[int], labels: NDArray[np.int64]) -> DecodedBatch:
        """The images of these dataset indices, all of which are there.

        Args:
            indices: N of them, in the order wanted.
            labels: int64 [N].
        """
        index = torch.tensor(indices, dtype=torch.int64)
        with self._lock:
            offset, sizes = self._offset[index], self._sizes[index]
            for event in self._written.values():
                cuda.current_stream(self._pixels.device).wait_event(event)
        pixels = self._pixels
        if self._moves:
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

    def _say(self) -> None:
        """Say at every quarter how much is there."""
        mark = _MARKS * self._kept // self.nbytes if self.nbytes else 0
        if mark > self._said:
            self._said = mark
            _log.info("cache: %d %% of the images are decoded and kept", 100 * self._kept // self.nbytes)


class KeptSource:
    """A source whose decoded images are kept in a store; meets the `Source` contract, as the source itself does."""

    def __init__(self, source: Source, store: PixelStore) -> None:
        self.store = store
        self._source = source
        self.labels, self.classes, self.nbytes = source.labels, source.classes, source.nbytes
        self.fingerprint, self.location = source.fingerprint, source.location

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> NDArray[np.uint8]:
        """As the source."""
        return self._source.read(index)

    def read_together(self, indices: Sequence[int]) -> list[NDArray[np.uint8] | None]:
        """As the source."""
        source = self._source
        return source.read_together(indices) if isinstance(source, ReadsTogether) else [None] * len(indices)

    def key(self, index: int) -> str:
        """As the source."""
        return self._source.key(index)

    def will_need(self, indices: Sequence[int]) -> None:
        """As the source, for images that are not kept yet."""
        missing = [index for index in indices if index not in self.store]
        if missing and isinstance(self._source, ReadsAhead):
            self._source.will_need(missing)

    def close(self) -> None:
        """As the source."""
        self._source.close()


Cache = Literal["off", "host", "device", "auto"]
CHOICES = ("off", "host", "device", "auto")
SHARE = {"device": 0.4, "host": 0.5}
"""Of the free memory that auto takes at most: evaluations and other programs need the rest."""
MOST = 0.9
"""Of the free memory that may be asked for by name, and of what steps leave of a GPU's."""
_READERS = 8
_PART = 1000  # images between two reports
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Free memory in bytes.

    Attributes:
        host: of the machine, for each of the processes that train on it.
        device: of the GPU; 0 without one.
        steps: what training steps will take of the GPU's.
    """

    host: int
    device: int = 0
    steps: int = 0

    def of(self, place: str) -> int:
        """Free bytes at a place."""
        return self.host if place == "host" else self.device

    def most(self, place: str, choice: Cache) -> int:
        """Bytes that pixels may take there."""
        left = self.of(place) - (self.steps if place == "device" else 0)
        named = int(MOST * max(0, left))
        return min(named, int(SHARE[place] * self.of(place))) if choice == "auto" else named


def free_memory(device: torch.device, *, processes: int) -> Memory:
    """What is free now, within the limit that a container sets."""
    free = [_available()]
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free.append(max(0, limit - used))
    on_gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return Memory(host=min(free) // processes, device=on_gpu)


def keep_decoded(
    source: Source,
    choice: Cache,
    *,
    device: torch.device,
    memory: Memory,
    progress: Callable[[int], None] | None = None,
) -> tuple[Source, str]:
    """The source itself, or one whose decoded images are kept from their first use on.

    Every process keeps all images, since every one comes to each sooner or later.

    Args:
        source: the encoded images.
        choice: where to keep them; auto takes the GPU's memory, else the machine's, else none, by `SHARE`; steps keep
            what they need of the GPU's.
        device: where the views are made.
        memory: what is free.
        progress: called with the number of images whose size is known.

    Returns:
        The source, and a sentence that says what is kept where and why; "" for off.

    Raises:
        InputError: the place that was named has not so much memory, or there is no such place.
    """
    if choice not in CHOICES:
        raise invalid("cache", choice, f"one of {', '.join(CHOICES)}", "choose one of these")
    if choice == "off":
        return source, ""
    if choice == "device" and device.type != "cuda":
        raise InputError(
            f"cache is 'device' but must be off, host or auto on a {device.type} device, whose memory is the "
            "machine's: take host."
        )
    places = [choice] if choice != "auto" else ["device", "host"] if device.type == "cuda" else ["host"]
    most = {place: memory.most(place, choice) for place in places}
    least = int(source.nbytes.sum())  # decoded images are larger than their files
    if least > max(most.values()):
        return source, _refused(choice, least, f"more than {_gb(least)}", most, memory)
    sizes = pixel_bytes(source, progress=progress)
    needed = int(sizes.sum())
    fitting = [place for place in places if needed <= most[place]]
    if not fitting:
        return source, _refused(choice, needed, _gb(needed), most, memory)
    return _kept(source, sizes, fitting, device)


def _kept(source: Source, sizes: NDArray[np.int64], places: list[str], device: torch.device) -> tuple[Source, str]:
    """Reserve the memory at the first place that has it; the source itself where none has."""
    needed, failures = _gb(int(sizes.sum())), []
    for place in places:
        where = device if place == "device" else torch.device("cpu")
        try:
            store = PixelStore(sizes, device=where, on=device)
        except (RuntimeError, MemoryError) as error:
            failures.append(f"the {_name(place)}'s memory had no room for {needed} ({_first(error)})")
            continue
        said = f"cache: the {_name(place)}'s memory keeps {needed} of pixels; each image is decoded once"
        return KeptSource(source, store), "; ".join([said, *failures])
    return source, f"cache: OFF, images are decoded at every use: {'; '.join(failures)}"


def _refused(choice: Cache, needed: int, told: str, most: dict[str, int], memory: Memory) -> str:
    """Why no images are kept; raises where it was asked for."""
    allowed = " and ".join(f"{_gb(most[place])} of the {_name(place)}'s {_gb(memory.of(place))} free" for place in most)
    if memory.steps and "device" in most:
        allowed += f" ({_gb(memory.steps)} of the GPU's are for training steps)"
    if choice == "auto":
        return f"cache: off, because the pixels of all images take {told}, and at most {allowed} are taken"
    other: Cache = "host" if choice == "device" else "device"
    fits = needed <= memory.most(other, other)
    remedy = f"take --cache {other} ({_gb(memory.of(other))} free), or " if fits else "take "
    raise InputError(
        f"cache is {choice!r} but the pixels of all images take {told} and at most {allowed} can be taken: {remedy}"
        "--cache off, or convert the images with mvssl-convert --max-size, which makes them smaller."
    )


def pixel_bytes(source: Source, *, progress: Callable[[int], None] | None = None) -> NDArray[np.int64]:
    """Bytes that each image has decoded, from its header: int64 [len]; 0 where it cannot be told or is too large.

    Reads every file once, which the first epoch then finds in the system's memory.
    """
    sizes = np.zeros(len(source), dtype=np.int64)
    share = max(1, min(_PART, -(-len(source) // _READERS)))
    parts = [range(at, min(at + share, len(source))) for at in range(0, len(source), share)]

    def measure(part: range) -> int:
        for index, pixels in _pixels(source, part):
            sizes[index] = 3 * pixels if pixels <= MAX_PIXELS else 0
        return len(part)

    done = 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="mvssl-sizes") as pool:
        for count in pool.map(measure, parts):
            done += count
            if progress is not None:
                progress(done)
    return sizes


def _pixels(source: Source, indices: range) -> Iterator[tuple[int, int]]:
    """Each index with its number of pixels, 0 where the file does not tell."""
    for index in indices:
        try:
            data = source.read(index)
        except OSError:  # the fetcher will name it
            continue
        header = sniff(data)
        if header is not None:
            yield index, header.height * header.width
            continue
        try:
            with Image.open(io.BytesIO(data.data)) as image:
                yield index, image.width * image.height
        except Exception:  # Pillow raises any type on a broken file, which the decoder will name
            continue


def _available() -> int:
    """MemAvailable of /proc/meminfo in bytes; where there is none, all that can be addressed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 2**62)


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none ("max")."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _name(place: str) -> str:
    return "GPU" if place == "device" else "machine"


def _gb(count: int) -> str:
    return f"{count / _GB:.2f} GB" if count >= _GB / 100 else f"{count / 1e6:.2f} MB"


def _first(error: BaseException) -> str:
    """The first line of a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
