"""Work on the GPU beside the training stream: the thread that trains never waits for it on the host.

The thread that prepares batches may: for DALI, which hands a batch over when it knows its sizes, where pinned memory is
made for the first time, for a crop so large that the CPU resizes it, and when the GPU is `_MOST_HELD` batches behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipelines.batch import DecodedBatch

cuda: Any = torch.cuda  # Any: torch ships its streams and events without types
_MOST_HELD = 8  # batches in flight; a GPU further behind makes the producer's thread wait, never the training loop


def with_index(device: str | torch.device) -> torch.device:
    """The device; "cuda" gets the number of this thread's current one, because every thread has its own."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class SideStream:
    """A CUDA stream for the thread that prepares batches; on other devices everything here does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._held: deque[tuple[Any, object]] = deque()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Make it the current stream (and its device the current device) of this thread."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def upload(self, batch: DecodedBatch) -> DecodedBatch:
        """The batch on the device; through pinned memory, so that the host does not wait for the copy."""
        if self._stream is None or batch.device.type == "cuda":
            return batch
        return replace(batch, pixels=batch.pixels.pin_memory().to(self._device, non_blocking=True))

    def mark(self, *held: object) -> torch.cuda.Event | None:
        """An event after the work so far; `held` (encoded bytes, decoded pixels) lives until it has happened."""
        if self._stream is None:
            return None
        event: torch.cuda.Event = cuda.Event()
        event.record(self._stream)
        self._held.append((event, held))
        if len(self._held) > _MOST_HELD:
            self._held[0][0].synchronize()
        while self._held and self._held[0][0].query():
            self._held.popleft()
        return event


def receive(tensors: Iterable[Tensor], event: torch.cuda.Event | None) -> None:
    """In the consumer's thread: let its current stream wait for the event, and keep the memory until it is done."""
    if event is None:
        return
    for tensor in tensors:
        stream = torch.cuda.current_stream(tensor.device)
        stream.wait_event(event)
        tensor.record_stream(stream)
