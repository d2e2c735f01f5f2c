"""Random access to the images of Parquet files: whole row groups are decoded, and the last used ones cached."""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pipelines.runtime import InputError
from pipelines.storage.forms.base import need, unreadable
from pipelines.storage.forms.blobs import largest_unpacked
from pipelines.storage.forms.columns import Columns
from pipelines.storage.forms.parquet import naming_parquet, read_path, readable
from pipelines.storage.range_source import Stamp, open_stamped
from pipelines.storage.remote_objects import RemoteObject

MOST_BYTES = 1 << 29
"""Decoded row groups that are cached, in bytes; at least two groups are."""
_BUFFER = 1 << 20  # bytes
_MOST_AHEAD = 1 << 27  # bytes of row groups fetched ahead
_BATCH = 1024  # rows that are decoded before their bytes are counted


class RowGroupReader:
    """Reads images by row, in any order and from any thread. Implements `Reader`.

    Groups are decoded without the GIL and without a lock, each by the thread that needs it first.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Path, int]],
        rows: Sequence[int],
        columns: Columns,
        spans: Sequence[tuple[int, int]],
        *,
        stamps: Mapping[Path, Stamp] = MappingProxyType({}),
    ) -> None:
        """Read groups (file, number in it) of so many `rows` each, of files that are as their `stamps` say.

        Their images lie in the bytes `spans` (start, end) of their files.
        """
        self._stamps = stamps
        self.spans = tuple(spans)
        self.groups, self.rows, self.columns = tuple(groups), tuple(rows), columns
        self._ends = np.cumsum(rows).tolist()
        self._guard = threading.Lock()
        self._cached: OrderedDict[int, Any] = OrderedDict()  # group -> array, the last used one last
        self._locks: dict[int, threading.Lock] = {}  # of groups that are being decoded
        self._footers: OrderedDict[Path, Any] = OrderedDict()

    def read(self, row: int) -> Any:
        """See `Reader`. The bytes are copied, as what views them would keep its whole row group in memory."""
        group = bisect.bisect_right(self._ends, row)
        value = self._values(group)[row - (self._ends[group - 1] if group else 0)]
        if self.columns.is_struct:
            path = value.get("path") if self.columns.has_path and value.is_valid else None
            value = value["bytes"] if value.is_valid else value
            if not value.is_valid and path is not None and path.is_valid:
                return read_path(path.as_py(), self.groups[group][0].parent)
        if not value.is_valid:
            raise unreadable("its row has no image")
        return np.frombuffer(value.as_buffer(), np.uint8).copy()

    def will_need(self, rows: Sequence[int]) -> None:
        """Start fetching the row groups of some rows, if they are at a URL and not cached; returns at once."""
        ahead = 0
        for group in dict.fromkeys(bisect.bisect_right(self._ends, row) for row in rows):
            path, (start, end) = self.groups[group][0], self.spans[group]
            if isinstance(path, RemoteObject) and group not in self._cached:
                ahead += end - start
                if ahead > _MOST_AHEAD:  # more would push out of memory what is needed first
                    return
                path.will_need(start, end)

    def _values(self, group: int) -> Any:
        """The images of a group."""
        with self._guard:
            if group in self._cached:
                self._cached.move_to_end(group)
                return self._cached[group]
            lock = self._locks.setdefault(group, threading.Lock())
        with lock:
            with self._guard:
                if group in self._cached:
                    return self._cached[group]
            values = self._decoded(group)
            with self._guard:
                self._cached[group] = values
                self._locks.pop(group, None)
                while len(self._cached) > 2 and sum(one.nbytes for one in self._cached.values()) > MOST_BYTES:
                    self._cached.popitem(last=False)
            return values

    def _decoded(self, group: int) -> Any:
        pq = need("pyarrow.parquet", "Reading Parquet")
        path, number = self.groups[group]
        names = [self.columns.leaf, *([f"{self.columns.image}.path"] if self.columns.has_path else [])]
        with self._guard:
            footer = self._footers.get(path)
        if isinstance(path, RemoteObject):
            path.will_need(*self.spans[group])
        elif path in self._stamps:  # a footer that is cached would lead to other bytes
            open_stamped(path, self._stamps[path])
        with (
            naming_parquet(path),
            pq.ParquetFile(readable(path), metadata=footer, pre_buffer=False, buffer_size=_BUFFER) as opened,
        ):
            footer, chunks = opened.metadata, []
            most = largest_unpacked(path.stat().st_size)
            for batch in opened.iter_batches(_BATCH, row_groups=[number], columns=names, use_threads=False):
                chunks.append(batch.column(0))
                most -= batch.nbytes
                if most < 0:
                    raise InputError(
                        f"{path} is damaged (row group {number} unpacks to far more than the file): download it again."
                    )
        with self._guard:
            self._footers[path] = footer
            while len(self._footers) > 64:
                self._footers.popitem(last=False)
        found, expected = sum(map(len, chunks)), self.rows[group]
        if found != expected:
            raise InputError(
                f"{path} has {found} rows in group {number} but had {expected} when it was indexed: start again, so "
                "that it is indexed again."
            )
        return chunks[0] if len(chunks) == 1 else _Chunks(chunks)

    def close(self) -> None:
        """See `Reader`."""
        with self._guard:
            self._cached.clear()
            self._footers.clear()
        for path, _ in self.groups[:1]:  # all are of one store
            if isinstance(path, RemoteObject):
                path.release()


class _Chunks:
    """Arrays one after another, which Arrow cannot join where they have more than 2 GiB."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays]).tolist()
        self.nbytes = sum(array.nbytes for array in arrays)

    def __getitem__(self, row: int) -> Any:
        at = bisect.bisect_right(self._ends, row)
        return self._arrays[at][row - (self._ends[at - 1] if at else 0)]
