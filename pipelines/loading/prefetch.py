"""Running a generator ahead of its consumer, in a thread, with a bounded queue."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")
_PATROL = 1.0  # seconds of waiting after which the consumer looks whether the producer still lives
_LONG = 60.0  # seconds of waiting for one item after which the consumer's complaint is called


class _Queue(Generic[T]):
    """What the two threads share: finished items, the end, and the wish to stop."""

    def __init__(self, depth: int, *, room_first: bool) -> None:
        self.changed = threading.Condition()
        self.depth = depth
        self.room_first = room_first
        self.items: deque[T] = deque()
        self.stopped = False
        self.ended = False
        self.error: BaseException | None = None

    def wanted(self) -> bool:
        """Wait until the next item may be made; False if the consumer has stopped."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or not self.room_first or len(self.items) < self.depth)
            return not self.stopped

    def put(self, item: T) -> bool:
        """Wait for a free place; False if the consumer has stopped."""
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

    def get(self, producer: threading.Thread, complain: Callable[[float], None] | None) -> T:
        """Wait for the next item of this thread; `complain` is called once if that takes long.

        Raises:
            StopIteration: there is none.
            Exception: what the producer raised, after the items it had made before.
            RuntimeError: the producer is gone, or ended by what is no Exception (SystemExit, KeyboardInterrupt).
        """
        waits = 0
        with self.changed:
            while not self.changed.wait_for(lambda: self.items or self.ended or self.stopped, timeout=_PATROL):
                if not producer.is_alive() and not self.ended:
                    raise RuntimeError(f"The thread {producer.name} is gone without a word.")
                waits += 1
                if complain is not None and (waits - 1) * _PATROL < _LONG <= waits * _PATROL:
                    complain(waits * _PATROL)
            if self.items:
                item = self.items.popleft()
                self.changed.notify_all()
                return item
            error, self.error = self.error, None
        if error is None:
            raise StopIteration
        if isinstance(error, Exception):
            raise error
        # Not the consumer's own: a SystemExit raised here would end its program as if all had gone well.
        raise RuntimeError(f"The thread {producer.name} was ended by {error!r}.") from error

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.items.clear()
            self.changed.notify_all()


class Prefetcher(Generic[T]):
    """An iterator over a generator that runs in a thread of its own, at most `depth` finished items ahead.

    With `room_first` at most `depth` items exist before the consumer takes them, the one in the making included.

    What the generator raises is raised to the consumer, at its place among the items; however the thread ends, the
    consumer does not wait for ever. `close`, garbage collection and the interpreter's exit all stop the thread: it
    finishes the item it is at, closes the generator and ends.

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
        complain: Callable[[float], None] | None = None,
    ) -> None:
        """Start the thread.

        Args:
            items: what runs in it.
            depth: items that may wait.
            name: of the thread.
            room_first: whether an item is made only when there is room for it.
            complain: called in the consumer's thread with the seconds it has waited, once for an item that takes long.
        """
        self.wait_seconds = 0.0
        self._complain = complain
        self._queue: _Queue[T] = _Queue(depth, room_first=room_first)
        # A daemon, so that a full queue never keeps the interpreter alive; the finalizer ends it before exit.
        self._thread = threading.Thread(target=_produce, args=(items, self._queue), name=name, daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._queue, self._thread)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        start = time.monotonic()
        try:
            return self._queue.get(self._thread, self._complain)
        finally:
            self.wait_seconds += time.monotonic() - start

    def close(self) -> None:
        """Stop the thread and wait for its end; may be called twice."""
        self._finalizer()


def _produce(items: Generator[T, None, None], queue: _Queue[T]) -> None:
    error: BaseException | None = None
    try:
        while queue.wanted() and queue.put(next(items)):
            pass
    except StopIteration:
        pass
    except BaseException as caught:  # everything goes to the consumer, which decides
        error = caught
    try:
        items.close()
    except BaseException as caught:
        error = error or caught
    finally:
        queue.end(error)


def _stop(queue: _Queue[T], thread: threading.Thread) -> None:
    queue.stop()
    if thread is not threading.current_thread():  # a collection may run in the thread itself
        thread.join()
