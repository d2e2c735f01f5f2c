"""Features on disk, computed once and resumable, and their export as .npy or Parquet."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mvssl.distributed import World
from mvssl.runs.checked_json import write_json
from pipelines.arrays import read_header
from pipelines.files import read_json, temporary_path, whole_file
from pipelines.names import csv_text
from pipelines.runtime import InputError
from pipelines.storage.source import Source

MISSING, DONE, BAD = 0, 1, 2
Dtype = Literal["float16", "float32"]
_FLUSH_ROWS = 20_000
_CHUNK_ROWS = 65_536
_ENDINGS = (".npy", ".parquet")
_FILES = ("features.npy", "state.npy", "checks.npy")  # in the order of the store's arrays

logger = logging.getLogger("mvssl")


class FeatureStore:
    """Rows of features in a folder, in the arrays of `_FILES`; identity.json says what they are features of.

    Several ranks write their own rows into the same files, which must be on a shared file system.

    Attributes:
        values: float16 or float32 [rows, D], mapped from the disk.
        state: uint8 [rows]: MISSING, DONE or BAD (the image cannot be decoded).
        checks: uint32 [rows]: CRC-32 of each row that is DONE or BAD, started from its state.
    """

    def __init__(
        self, folder: Path, values: NDArray[Any], state: NDArray[np.uint8], checks: NDArray[np.uint32]
    ) -> None:
        self.folder = folder
        self.values = values
        self.state = state
        self.checks = checks
        self._unsaved: list[NDArray[np.int64]] = []
        self._bad: list[NDArray[np.int64]] = []

    def missing(self, rows: range) -> NDArray[np.int64]:
        """int64: those of the rows that are missing."""
        return rows.start + np.flatnonzero(self.state[rows.start : rows.stop] == MISSING)

    def write(self, rows: NDArray[np.int64], features: NDArray[np.float32], keys: Sequence[str]) -> None:
        """Store features [R, D] of the images `keys` as these rows.

        Raises:
            InputError: they are not finite, or overflow the store's dtype.
        """
        with np.errstate(over="ignore"):
            rounded = features.astype(self.values.dtype)
        finite = np.isfinite(rounded).all(axis=1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            if np.isfinite(features[row]).all():
                raise InputError(
                    f"The features of {keys[row]} reach {np.abs(features[row]).max():.3g}, more than float16 holds: "
                    "use --dtype float32."
                )
            raise not_finite(keys[row])
        self.values[rows] = rounded
        self._unsaved.append(rows)
        if sum(map(len, self._unsaved)) >= _FLUSH_ROWS:
            self.save()

    def mark_bad(self, rows: NDArray[np.int64]) -> None:
        """Leave these rows empty: their images cannot be decoded."""
        self.state[rows] = BAD
        self._bad.append(rows)

    def save(self) -> None:
        """Flush rows to the disk, then mark them as done."""
        self._flush("features.npy", self.values)
        for rows in self._unsaved:
            self.state[rows] = DONE
        for rows in (*self._unsaved, *self._bad):
            self.checks[rows] = _checksums(self.values[rows], self.state[rows])
        self._unsaved, self._bad = [], []
        self._flush("checks.npy", self.checks)
        self._flush("state.npy", self.state)

    def forget_damaged(self) -> int:
        """Mark rows that do not have their checksum as missing; returns their number."""
        damaged = 0
        for start in range(0, len(self.state), _CHUNK_ROWS):
            state = self.state[start : start + _CHUNK_ROWS]
            sums = _checksums(self.values[start : start + _CHUNK_ROWS], state)
            differ = sums != self.checks[start : start + _CHUNK_ROWS]
            wrong = (differ & (state != MISSING) | (state > BAD)).nonzero()[0]
            state[wrong] = MISSING
            damaged += len(wrong)
        return damaged

    def _flush(self, name: str, array: NDArray[Any]) -> None:
        if isinstance(array, np.memmap):
            array.flush()
            with (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())


def _checksums(values: NDArray[Any], state: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """CRC-32 of each row of `values`, started from its state: uint32 [rows]."""
    rows = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    width = values.shape[1] * values.itemsize
    return np.fromiter(
        (zlib.crc32(rows[n * width : (n + 1) * width], start) for n, start in enumerate(state.tolist())),
        dtype=np.uint32,
        count=len(state),
    )


def not_finite(key: str) -> InputError:
    """The error for an image whose features are NaN or infinite."""
    return InputError(
        f"The features of {key} are not finite (NaN or infinite): the weights have diverged, or the number format is "
        "too narrow for them; try --precision fp32, or another checkpoint."
    )


def open_store(
    folder: Path,
    *,
    rows: int,
    width: int,
    dtype: Dtype,
    identity: Mapping[str, Any],
    world: World | None = None,
    overwrite: bool = False,
) -> FeatureStore:
    """Create a store, or open an existing one of the same identity.

    Args:
        folder: of the store.
        rows: images times views.
        width: D.
        dtype: of the features on disk.
        identity: JSON values that determine the features.
        world: the ranks that write into it.
        overwrite: delete a store of another identity.

    Raises:
        InputError: the folder holds other features and `overwrite` is not set, or is not a store.
        OSError: the disk is full or the folder cannot be written; existing files are untouched.
    """
    world = world or World()
    world.run_on_rank0(
        lambda: _create(folder, {"rows": rows, "width": width, "dtype": dtype, **identity}, overwrite=overwrite)
    )

    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "features.npy": (dtype, (rows, width)),
        "state.npy": ("uint8", (rows,)),
        "checks.npy": ("uint32", (rows,)),
    }

    def mapped(name: str) -> NDArray[Any]:
        try:
            return _mapped(folder / name, *expected[name])
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder / name} cannot be read ({error}): delete the folder {folder}, or give the processes of all "
                "machines a folder that they share."
            ) from error

    def opened() -> FeatureStore:
        return FeatureStore(folder, *(mapped(name) for name in _FILES))

    def check() -> None:
        store = opened()
        if not store.checks.any():  # a store of an earlier version, or an empty one
            store.checks[:] = _checksums(store.values, store.state)
        if damaged := store.forget_damaged():
            logger.warning("%s: %d features are damaged and will be computed again", folder, damaged)
        store.save()

    world.run_on_rank0(check)
    return world.run_on_all(opened)


def bytes_needed(rows: int, width: int, dtype: Dtype) -> int:
    """Size of a store on disk."""
    return rows * (width * np.dtype(dtype).itemsize + 5)


def _create(folder: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Create a store, unless one of the same identity exists."""
    path = folder / "identity.json"
    if path.exists():
        try:
            existing = read_json(path)
        except ValueError:
            existing = None
        if existing == json.loads(json.dumps(identity)):
            if not (folder / "checks.npy").exists():  # written by an earlier version
                _allocate(folder / "checks.npy", (identity["rows"],), "uint32")
            return
        if not overwrite:
            differ = [key for key in identity if not isinstance(existing, dict) or existing.get(key) != identity[key]]
            raise InputError(
                f"{folder} holds other features ({', '.join(differ)} differ): add --overwrite to replace them, or "
                "choose another place with --out."
            )
        path.unlink()
    elif folder.is_dir() and {file.name for file in folder.iterdir()} - {*_FILES, temporary_path(path).name}:
        raise InputError(
            f"{folder} exists and holds other files, so it is left alone: choose another place with --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _allocate(folder / "features.npy", (identity["rows"], identity["width"]), identity["dtype"])
    _allocate(folder / "state.npy", (identity["rows"],), "uint8")
    _allocate(folder / "checks.npy", (identity["rows"],), "uint32")
    write_json(path, identity)


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array in a file, mapped for writing.

    Raises:
        OSError: it cannot be read.
        ValueError: it is another array, or a link, through which other files would be written.
    """
    header = read_header(path)
    if path.is_symlink():
        raise ValueError(f"it is a link to {os.readlink(path)}")
    if (header.dtype, header.shape, header.fortran) != (np.dtype(dtype), shape, False):
        raise ValueError(f"it holds {header.dtype} {list(header.shape)} instead of {dtype} {list(shape)}")
    return np.memmap(path, dtype=header.dtype, mode="r+", offset=header.offset, shape=shape)


def _allocate(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Create an array of zeros with its blocks allocated: a full disk would kill a process that writes a mapped file.

    Raises:
        OSError: the disk is full; no file is left.
    """
    path.unlink(missing_ok=True)
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        del array
        with path.open("rb+") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_ending(out: Path) -> None:
    """Check that features can be exported to this file.

    Raises:
        InputError: the ending is unknown, or pyarrow is missing.
    """
    if out.suffix not in _ENDINGS:
        raise InputError(f"OUT is {str(out)!r} but must end in {' or '.join(_ENDINGS)}: choose one.")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError("OUT is a Parquet file, which needs pyarrow: pip install pyarrow, or write .npy.")


def write_table(out: Path, store: FeatureStore, source: Source) -> int:
    """Export the rows that are done, in dataset order; returns their number.

    .npy: float [M, D], and OUT.csv with the columns row, key, label (-1: none) and class; keys and class names are
    `csv_text`. Parquet: the columns key, label, class and feature (a list of D numbers).

    Raises:
        OSError: the file cannot be written; an earlier one is untouched.
    """
    rows = np.flatnonzero(store.state == DONE)
    with whole_file(out) as table:
        if out.suffix == ".parquet":
            _write_parquet(table, store, source, rows)
        else:
            _write_npy(table, store, rows)
            with whole_file(out.with_suffix(".csv")) as keys:
                _write_keys(keys, source, rows)
    return len(rows)


def _write_npy(path: Path, store: FeatureStore, rows: NDArray[np.int64]) -> None:
    if len(rows) == len(store.state):
        shutil.copyfile(store.folder / "features.npy", path)
        return
    with path.open("wb") as file:
        header = {"descr": store.values.dtype.str, "fortran_order": False, "shape": (len(rows), store.values.shape[1])}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in _chunks(rows):
            file.write(np.ascontiguousarray(store.values[chunk]).tobytes())


def _write_keys(path: Path, source: Source, rows: NDArray[np.int64]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "key", "label", "class"))
        for number, index in enumerate(rows.tolist()):
            label, name = _label(source, index)
            writer.writerow((number, csv_text(source.key(index)), label, csv_text(name)))


def _write_parquet(path: Path, store: FeatureStore, source: Source, rows: NDArray[np.int64]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = store.values.shape[1]
    kind = pa.float16() if store.values.dtype == np.float16 else pa.float32()
    schema = pa.schema(
        [("key", pa.string()), ("label", pa.int64()), ("class", pa.string()), ("feature", pa.list_(kind, width))]
    )
    with path.open("wb") as file, pq.ParquetWriter(file, schema) as writer:  # takes no path that is not UTF-8
        for chunk in _chunks(rows):
            features = pa.array(np.ascontiguousarray(store.values[chunk]).reshape(-1), type=kind)
            labels = [_label(source, index) for index in chunk.tolist()]
            columns: list[Any] = [
                pa.array([source.key(index) for index in chunk.tolist()]),
                pa.array([label for label, _ in labels], type=pa.int64()),
                pa.array([name for _, name in labels], type=pa.string()),
                pa.FixedSizeListArray.from_arrays(features, width),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _label(source: Source, index: int) -> tuple[int, str]:
    label = int(source.labels[index])
    return label, source.classes[label] if label >= 0 else ""


def _chunks(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Parts of the rows, so that memory does not grow with the data."""
    for at in range(0, len(rows), _CHUNK_ROWS):
        yield rows[at : at + _CHUNK_ROWS]
