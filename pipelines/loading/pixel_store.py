"""Decoded images kept: one buffer for the pixels of a whole data set, filled as its images are first used."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import DecodedBatch
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
