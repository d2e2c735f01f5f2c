"""Threads of the loader: a generator in a thread with a bounded queue, read-ahead for storages, and a CUDA side stream.

The training thread never waits for the device on the host. The thread that prepares batches may: for DALI, which
returns a batch when its sizes are known, for the first allocation of pinned memory, for crops so large that the CPU
resizes them, and when the GPU is `_MAX_IN_FLIGHT` batches behind.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.runtime import InputError
from pipelines.storage.source import ReadsAhead, Source

T = TypeVar("T")
_CHECK_EVERY = 1.0  # seconds between checks that the producer is alive
_SLOW_AFTER = 60.0  # seconds of waiting for one item before `warn_slow` is called


class Prefetcher(Generic[T]):
    """An iterator over a generator that runs in a thread, at most `depth` finished items ahead.

    With `room_first` at most `depth` items exist before the consumer takes them, including the one being produced.

    Exceptions of the generator are raised to the consumer, in order; however the thread ends, the consumer never waits
    forever. `close`, garbage collection and interpreter exit stop the thread: it finishes its current item, closes the
    generator and ends.

    Attributes:
        wait_seconds: time the consumer has waited for items so far (monotonic clock).
    """

    def __init__(
        self,
        items: Generator[T, None, None],
        *,
        depth: int,
        name: str,
        room_first: bool = False,
        warn_slow: Callable[[float], None] | None = None,
    ) -> None:
        """Start the thread.

        Args:
            items: runs in the thread.
            depth: items that may wait.
            name: of the thread.
            room_first: produce an item only when there is room for it.
            warn_slow: called in the consumer's thread with the seconds waited, once per slow item.
        """
        self.wait_seconds = 0.0
        self._warn_slow = warn_slow
        self._queue: _Queue[T] = _Queue(depth, room_first=room_first)
        # A daemon, so that a full queue never keeps the interpreter alive; the finalizer stops it before exit.
        self._thread = threading.Thread(target=_produce, args=(items, self._queue), name=name, daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._queue, self._thread)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        start = time.monotonic()
        try:
            return self._queue.get(self._thread, self._warn_slow)
        finally:
            self.wait_seconds += time.monotonic() - start

    def close(self) -> None:
        """Stop the thread and wait for it; may be called twice."""
        self._finalizer()


def _produce(items: Generator[T, None, None], queue: _Queue[T]) -> None:
    error: BaseException | None = None
    try:
        while queue.wanted() and queue.put(next(items)):
            pass
    except StopIteration:
        pass
    except BaseException as caught:  # raised to the consumer
        error = caught
    try:
        items.close()
    except BaseException as caught:
        error = error or caught
    finally:
        queue.end(error)


def _stop(queue: _Queue[T], thread: threading.Thread) -> None:
    queue.stop()
    if thread is not threading.current_thread():  # garbage collection may run in the thread itself
        thread.join()


class _Queue(Generic[T]):
    """State shared by producer and consumer: finished items, end, and request to stop."""

    def __init__(self, depth: int, *, room_first: bool) -> None:
        self.changed = threading.Condition()
        self.depth = depth
        self.room_first = room_first
        self.items: deque[T] = deque()
        self.stopped = False
        self.ended = False
        self.error: BaseException | None = None

    def wanted(self) -> bool:
        """Wait until the next item may be produced; False if the consumer has stopped."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or not self.room_first or len(self.items) < self.depth)
            return not self.stopped

    def put(self, item: T) -> bool:
        """Wait for room; False if the consumer has stopped."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or len(self.items) < self.depth)
            if not self.stopped:
                self.items.append(item)
                self.changed.notify_all()
            return not self.stopped

    def end(self, error: BaseException | None) -> None:
        with self.changed:
            self.ended = True
            self.error = error
            self.changed.notify_all()

    def get(self, producer: threading.Thread, warn_slow: Callable[[float], None] | None) -> T:
        """Wait for the next item; `warn_slow` is called once if that takes long.

        Raises:
            StopIteration: there are no more items.
            Exception: raised by the producer after the items it had produced.
            RuntimeError: the producer died, or was ended by SystemExit or KeyboardInterrupt.
        """
        waits = 0
        with self.changed:
            while not self.changed.wait_for(lambda: self.items or self.ended or self.stopped, timeout=_CHECK_EVERY):
                if not producer.is_alive() and not self.ended:
                    raise RuntimeError(f"Loader thread {producer.name!r} died without raising; please report this.")
                waits += 1
                if warn_slow is not None and (waits - 1) * _CHECK_EVERY < _SLOW_AFTER <= waits * _CHECK_EVERY:
                    warn_slow(waits * _CHECK_EVERY)
            if self.items:
                item = self.items.popleft()
                self.changed.notify_all()
                return item
            error, self.error = self.error, None
        if error is None:
            raise StopIteration
        if isinstance(error, Exception):
            raise error
        # A SystemExit raised here would end the consumer's program as if it had succeeded.
        raise RuntimeError(f"Loader thread {producer.name!r} was ended by {error!r}.") from error

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.items.clear()
            self.changed.notify_all()


BATCHES_AHEAD = 4
"""Batches announced to the storage before they are read: enough to keep a disk's queue full with little memory."""


class ReadAhead:
    """Announces upcoming reads to a source that `ReadsAhead`, in a thread of its own.

    The thread may block on a full disk queue or on opening a file over a network; nobody waits for it, and indices that
    have been read meanwhile are skipped.
    """

    def __init__(self, source: Source, batches: Iterator[Sequence[int]], *, lead: int, late: int = 0) -> None:
        """Announce the first batches.

        Args:
            source: the storage.
            batches: dataset indices, one batch's worth after another, in reading order.
            lead: batches to be ahead, at least 1.
            late: batches for which announced indices may still be unread.
        """
        self._batches = batches
        self._pending: deque[Sequence[int]] = deque(islice(batches, lead), maxlen=lead + late)
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        if isinstance(source, ReadsAhead):
            # A daemon: it must not keep the interpreter alive if the loader is never closed.
            self._thread = threading.Thread(target=self._announce, args=(source,), name="mvssl-ahead", daemon=True)
            self._thread.start()

    def advance(self) -> None:
        """A batch is about to be read: announce one more. Returns at once."""
        indices = next(self._batches, None)
        if indices is not None:
            with self._changed:
                self._pending.append(indices)
                self._changed.notify()

    def close(self) -> None:
        """Stop the thread after its current batch."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _announce(self, source: ReadsAhead) -> None:
        """Runs in the thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._pending)
                if self._closed:
                    return
                indices = self._pending.popleft()
            with contextlib.suppress(OSError, InputError):  # the read itself reports it
                source.will_need(indices)


cuda: Any = torch.cuda  # Any: torch ships its streams and events without types
_MAX_IN_FLIGHT = 8  # batches in flight; a GPU further behind makes the producer's thread wait, never the training loop


class SideStream:
    """A CUDA stream for the thread that prepares batches; does nothing on other devices."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._held: deque[tuple[Any, object]] = deque()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Make it this thread's current stream, and its device the current device."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def upload(self, batch: DecodedBatch) -> DecodedBatch:
        """Copy a batch to the device through pinned memory, without waiting for the copy."""
        if self._stream is None or batch.device.type == "cuda":
            return batch
        return replace(batch, pixels=batch.pixels.pin_memory().to(self._device, non_blocking=True))

    def mark(self, *held: object) -> torch.cuda.Event | None:
        """An event after the work so far; `held` (encoded bytes, decoded pixels) stays alive until then."""
        if self._stream is None:
            return None
        event: torch.cuda.Event = cuda.Event()
        event.record(self._stream)
        self._held.append((event, held))
        if len(self._held) > _MAX_IN_FLIGHT:
            self._held[0][0].synchronize()
        while self._held and self._held[0][0].query():
            self._held.popleft()
        return event


def receive(tensors: Iterable[Tensor], event: torch.cuda.Event | None) -> None:
    """In the consumer's thread: its current stream waits for the event, and memory is not reused before it is done."""
    if event is None:
        return
    for tensor in tensors:
        stream = torch.cuda.current_stream(tensor.device)
        stream.wait_event(event)
        tensor.record_stream(stream)
