"""Telling a storage what is read soon, so that its disk works while decoding and training do."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from pipelines.errors import InputError
from pipelines.storage.source import ReadsAhead, Source

BATCHES_AHEAD = 4
"""Batches that the storage hears of before they are read: a disk's queue stays full, and little memory is taken."""


class ReadAhead:
    """Names what is read soon to a source that `ReadsAhead`, in order, in a thread of its own.

    The thread waits where a disk's queue is full or a file on a network is opened, and nobody waits for it: what it has
    not come to when it is read anyway is left out.
    """

    def __init__(self, source: Source, batches: Iterator[Sequence[int]], *, lead: int, late: int = 0) -> None:
        """Begin with the first batches.

        Args:
            source: the storage.
            batches: dataset indices, a batch's worth after the other, as they are best read.
            lead: batches to be ahead, at least 1.
            late: batches after which something of a batch's worth may still be unread.
        """
        self._batches = batches
        self._waiting: deque[Sequence[int]] = deque(islice(batches, lead), maxlen=lead + late)
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        if isinstance(source, ReadsAhead):
            # A daemon: it must not keep an interpreter alive whose loader nobody has closed.
            self._thread = threading.Thread(target=self._name, args=(source,), name="mvssl-ahead", daemon=True)
            self._thread.start()

    def advance(self) -> None:
        """One batch is about to be read: name one more; returns at once."""
        indices = next(self._batches, None)
        if indices is not None:
            with self._changed:
                self._waiting.append(indices)
                self._changed.notify()

    def close(self) -> None:
        """End the thread behind the batch that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _name(self, source: ReadsAhead) -> None:
        """Runs in the thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                indices = self._waiting.popleft()
            with contextlib.suppress(OSError, InputError):  # reading says so again, in its place
                source.will_need(indices)
