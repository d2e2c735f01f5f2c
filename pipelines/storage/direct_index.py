"""The cached index of files that are read in place: which images they hold, and where."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.arrays import read_arrays
from pipelines.files import cache_folder, cache_folders, parse_json, publish, writable_cache
from pipelines.names import Url, utf8
from pipelines.runtime import describe_os_error
from pipelines.storage.forms.base import FormSource, Labels, Ranges
from pipelines.storage.forms.columns import Columns
from pipelines.storage.forms.row_groups import MOST_BYTES, RowGroupReader
from pipelines.storage.range_source import RangeSource, Stamp
from pipelines.storage.remote_ranges import RemoteRanges
from pipelines.storage.source import KeyTable, Source, check_columns

_log = logging.getLogger("mvssl.data")
_VERSION = zlib.crc32(repr(("direct", 3)).encode())
_MTIME_RESOLUTION = 2_000_000_000  # nanoseconds; FAT and some NFS servers have 2 s
_RANGE_COLUMNS, _GROUP_COLUMNS = (
    ("file", "offset"),
    ("group_file", "group_number", "group_rows", "group_start", "group_end"),
)


@dataclass(frozen=True, kw_only=True)
class Stamps:
    """Files that are read in place, as they are now, in order."""

    paths: tuple[Path, ...]
    stamps: tuple[Stamp, ...]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Stamps:
        """Look at `paths`; raises OSError."""
        found = [path.stat() for path in paths]
        stamps = tuple(Stamp(size=one.st_size, mtime=one.st_mtime_ns) for one in found)
        return cls(paths=tuple(paths), stamps=stamps)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What identifies them in an index."""
        names = KeyTable.of(map(_absolute, self.paths))
        numbers = np.array([(one.size, one.mtime) for one in self.stamps], dtype=np.int64).reshape(-1, 2)
        return {"path_blob": names.blob, "path_ends": names.ends, "stamps": numbers}

    def numbers(self, paths: Sequence[Path]) -> npt.NDArray[np.int64]:
        """Index of each of `paths` among these files."""
        number_of = {path: number for number, path in enumerate(self.paths)}
        return np.array([number_of[path] for path in paths], dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """The index of one split.

    Attributes:
        keys, labels, nbytes, classes: as in `FormSource`.
        place: int64 columns by name: `file` and `offset` of each image, or the row groups that hold the images.
        checksums: uint32 [N], CRC-32 of each image, or None.
        columns: of the table with the row groups; None for byte ranges.
        largest: bytes that no image exceeds.
        what: what the data are, for the user.
    """

    keys: KeyTable
    labels: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    place: dict[str, npt.NDArray[np.int64]]
    checksums: npt.NDArray[np.uint32] | None = None
    columns: Columns | None = None
    largest: int = 0
    what: str = ""

    @classmethod
    def of_ranges(cls, source: FormSource, ranges: Ranges, stamps: Stamps, *, what: str) -> Entry:
        """The index of images that lie in plain files."""
        return cls(
            keys=source.keys,
            labels=source.labels,
            nbytes=ranges.size.astype(np.int64),
            classes=source.classes,
            place={
                "file": stamps.numbers(ranges.paths)[ranges.file],
                "offset": ranges.offset.astype(np.int64),
            },
            checksums=ranges.checksums,
            what=what,
        )

    @classmethod
    def of_row_groups(cls, source: FormSource, reader: RowGroupReader, stamps: Stamps, *, what: str) -> Entry:
        """The index of images in row groups."""
        return cls(
            keys=source.keys,
            labels=source.labels,
            nbytes=source.nbytes,
            classes=source.classes,
            place={
                "group_file": stamps.numbers([path for path, _ in reader.groups]),
                "group_number": np.array([number for _, number in reader.groups], dtype=np.int64),
                "group_rows": np.array(reader.rows, dtype=np.int64),
                "group_start": np.array([start for start, _ in reader.spans], dtype=np.int64),
                "group_end": np.array([end for _, end in reader.spans], dtype=np.int64),
            },
            columns=reader.columns,
            largest=source.largest,
            what=what,
        )

    def source(self, location: Path, stamps: Stamps) -> Source:
        """A source over the files."""
        if self.columns is None:
            ranges = Ranges(
                paths=stamps.paths,
                file=self.place["file"],
                offset=self.place["offset"],
                size=self.nbytes,
                checksums=self.checksums,
            )
            index: dict[str, Any] = {
                "keys": self.keys,
                "labels": self.labels,
                "classes": self.classes,
                "ranges": ranges,
            }
            found: RangeSource | RemoteRanges
            if isinstance(location, Url):
                found = RemoteRanges(location, **index)
            else:
                found = RangeSource(location, **index, stamps=stamps.stamps)
            found.facts.notes = (described(location, len(self.keys), self.what),)
            return found
        files = [stamps.paths[number] for number in self.place["group_file"].tolist()]
        groups = list(zip(files, self.place["group_number"].tolist(), strict=True))
        source = FormSource(
            location,
            keys=self.keys,
            labels=Labels(values=self.labels, classes=self.classes),
            nbytes=self.nbytes,
            reader=RowGroupReader(
                groups,
                self.place["group_rows"].tolist(),
                self.columns,
                list(zip(self.place["group_start"].tolist(), self.place["group_end"].tolist(), strict=True)),
                stamps=dict(zip(stamps.paths, stamps.stamps, strict=True)),
            ),
            largest=self.largest,
        )
        source.facts.notes = self._notes(location)
        return source

    def _notes(self, location: Path) -> tuple[str, ...]:
        total, what = int(self.nbytes.sum()), described(location, len(self.keys), self.what)
        if total <= MOST_BYTES:
            return (what,)
        rows = int(np.median(self.place["group_rows"]))
        return (
            what,
            f"{location} is Parquet, of which {MOST_BYTES / total:.0%} stays decoded in memory: in random order each "
            f"image decodes its row group of {rows:,} images ({rows * total / len(self.labels) / 1e6:.0f} MB) again; "
            f"set order_chunk = {rows} in the recipe, or convert it with mvssl-convert.",
        )

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What is cached of it."""
        classes = KeyTable.of(self.classes)
        columns = b"" if self.columns is None else json.dumps(asdict(self.columns)).encode()
        sums = {} if self.checksums is None else {"checksums": self.checksums}
        return {
            "key_blob": self.keys.blob,
            "key_ends": self.keys.ends,
            "labels": self.labels,
            "nbytes": self.nbytes,
            "class_blob": classes.blob,
            "class_ends": classes.ends,
            "columns": np.frombuffer(columns, dtype=np.uint8),
            "largest": np.array(self.largest, dtype=np.int64),
            "what": np.frombuffer(utf8(self.what).encode(), dtype=np.uint8),
            **self.place,
            **sums,
        }

    @classmethod
    def from_arrays(cls, data: Mapping[str, Any], stamps: Stamps) -> Entry:
        """The index in arrays from a file.

        Raises:
            ValueError, KeyError, TypeError: they are damaged, or lead outside of the files.
        """
        columns = None
        if data["columns"].size:
            columns = Columns(**parse_json(data["columns"].tobytes()))
            columns = replace(columns, names=None, others=())
        entry = cls(
            keys=KeyTable.checked(data["key_blob"], data["key_ends"]),
            labels=data["labels"],
            nbytes=data["nbytes"],
            classes=tuple(KeyTable.checked(data["class_blob"], data["class_ends"])),
            place={name: data[name] for name in (_RANGE_COLUMNS if columns is None else _GROUP_COLUMNS)},
            checksums=data.get("checksums"),
            columns=columns,
            largest=int(data["largest"]),
            what=data["what"].tobytes().decode("utf-8", "replace"),
        )
        entry.check(stamps)
        return entry

    def check(self, stamps: Stamps) -> None:
        """Raise ValueError if it leads outside of the files."""
        count = len(self.keys)
        check_columns(count, len(self.classes), nbytes=self.nbytes, labels=self.labels)
        lengths = {len(column) for column in self.place.values()}
        if len(lengths) != 1 or any(column.dtype != np.int64 or column.ndim != 1 for column in self.place.values()):
            raise ValueError("its columns are damaged")
        file = self.place["file" if self.columns is None else "group_file"]
        if np.any((file < 0) | (file >= len(stamps.paths))):
            raise ValueError("it names a file that is not there")
        if self.columns is not None:
            rows = self.place["group_rows"]
            if int(rows.sum()) != count or np.any(rows < 1) or np.any(self.place["group_number"] < 0):
                raise ValueError("its row groups hold another number of images")
            return
        sizes = np.array([one.size for one in stamps.stamps], dtype=np.int64)[file]
        offset = self.place["offset"]
        if lengths != {count} or np.any((offset < 0) | (offset > sizes) | (self.nbytes > sizes - offset)):
            raise ValueError("an image is outside of its file")
        if self.checksums is not None and (self.checksums.dtype != np.uint32 or self.checksums.shape != (count,)):
            raise ValueError("its checksums are damaged")


def described(location: Path, count: int, what: str) -> str:
    """What the data are, for the log."""
    return f"{location}: {count:,} {'images' if count > 1 else 'image'}, {what}, read in place"


def cache_file(path: Path, split: str) -> Path:
    """The cache file for a split of the data at `path`."""
    name = hashlib.sha256(os.fsencode(f"{_absolute(path)}#{split}")).hexdigest()[:32]
    return cache_folder() / f"direct-{name}.npz"


def _absolute(path: Path) -> str:
    return str(path) if isinstance(path, Url) else os.path.abspath(path)


def load_entries(cache: Path, stamps: Stamps) -> dict[str, Entry] | None:
    """The cached indices by split; None if they are missing, damaged or of files as they were once."""
    found = (_load(folder / cache.name, stamps) for folder in cache_folders(cache.parent))
    return next((entries for entries in found if entries is not None), None)


def _load(cache: Path, stamps: Stamps) -> dict[str, Entry] | None:
    try:
        data = read_arrays(cache)
        same = all(np.array_equal(data[name], value) for name, value in stamps.arrays().items())
        if data["version"].tolist() != _VERSION or not same:
            return None
        names = list(KeyTable.checked(data["split_blob"], data["split_ends"]))
        entries = {}
        for number, name in enumerate(names):
            start = f"{number}_"
            own = {key.removeprefix(start): value for key, value in data.items() if key.startswith(start)}
            entries[name] = Entry.from_arrays(own, stamps)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entries or None


def save_entries(cache: Path, stamps: Stamps, entries: Mapping[str, Entry], *, where: Path) -> None:
    """Cache the indices; a warning says so if that is not possible.

    Files that changed in the last two seconds are not cached: a further change might not change their times.
    """
    if time.time_ns() - max(one.mtime for one in stamps.stamps) < _MTIME_RESOLUTION:
        return
    names = KeyTable.of(entries)
    arrays: dict[str, Any] = {
        "version": np.int64(_VERSION),
        "split_blob": names.blob,
        "split_ends": names.ends,
        **stamps.arrays(),
    }
    for number, entry in enumerate(entries.values()):
        arrays.update({f"{number}_{name}": value for name, value in entry.arrays().items()})
    try:
        target = writable_cache(cache.parent) / cache.name
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            temporary = Path(folder) / target.name
            np.savez(temporary, **arrays)
            publish(temporary, target)
    except OSError as error:
        _log.warning("%s is indexed at every start: its index is not cached: %s", where, describe_os_error(error))


@contextlib.contextmanager
def building(cache: Path) -> Iterator[None]:
    """Hold the right to build an index; other processes of this host wait for it, where the file system has locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock = stack.enter_context((writable_cache(cache.parent) / f"{cache.name}.lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
