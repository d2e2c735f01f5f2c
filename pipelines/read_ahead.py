"""Telling a storage what is read soon, so that its disk works while decoding and training do."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from pipelines.errors import InputError
from pipelines.storage.source import ReadsAhead, Source

BATCHES_AHEAD = 4
"""Batches that the storage hears of before they are read: a disk's queue stays full, and little memory is taken."""


class ReadAhead:
    """Names the batches to come to a source that `ReadsAhead`, in order, in a thread of its own.

    The thread waits where a disk's queue is full or a file on a network is opened, and nobody waits for it: batches
    that it has not come to when they are read anyway are left out.
    """

    def __init__(self, source: Source, batches: Iterator[Sequence[int]], *, lead: int) -> None:
        """Begin with the first batches.

        Args:
            source: the storage.
            batches: dataset indices of a batch after the other, as they are best read.
            lead: batches to be ahead, at least 1.
        """
        self._source = source
        self._batches = batches
        self._waiting: deque[Sequence[int]] = deque(islice(batches, lead), maxlen=lead)  # older ones are too late
        self._active = False
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mvssl-ahead")
        self._start()

    def advance(self) -> None:
        """One batch is about to be read: name one more; returns at once."""
        indices = next(self._batches, None)
        if indices is not None:
            with self._lock:
                self._waiting.append(indices)
            self._start()

    def close(self) -> None:
        """End the thread behind the batch that it is at."""
        with self._lock:
            self._waiting.clear()
        self._pool.shutdown()

    def _start(self) -> None:
        with self._lock:
            if self._active or not isinstance(self._source, ReadsAhead):
                return
            self._active = True
        self._pool.submit(self._name, self._source)

    def _name(self, source: ReadsAhead) -> None:
        """Runs in the thread until nothing is waiting."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._active = False
                    return
                indices = self._waiting.popleft()
            with contextlib.suppress(OSError, InputError):  # reading says so again, in its place
                source.will_need(indices)
