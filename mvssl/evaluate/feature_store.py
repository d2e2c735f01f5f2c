"""Features of a data set on disk, computed once: any number of images, and a stopped computation goes on.

A folder with features.npy (one row for each image and view), state.npy (whether the row is there) and identity.json
(of what). Several ranks write rows of their own into the same files, which have to lie on a file system they share.

Features of any images as a file that other programs read: .npy with a .csv of keys beside it, or Parquet.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mvssl.distributed import World
from mvssl.runs.folder import write_json
from pipelines.runtime import InputError
from pipelines.storage.source import Source

TO_DO, DONE, BAD = 0, 1, 2
Dtype = Literal["float16", "float32"]
_FLUSH = 20_000  # rows between two moments at which rows that are marked as done are on the disk


class FeatureStore:
    """Rows of features in a folder.

    Attributes:
        values: float16 or float32 [rows, D], mapped from the disk.
        state: uint8 [rows]: TO_DO, DONE or BAD (the image cannot be decoded).
    """

    def __init__(self, folder: Path, values: NDArray[Any], state: NDArray[np.uint8]) -> None:
        self.folder = folder
        self.values = values
        self.state = state
        self._unsaved: list[NDArray[np.int64]] = []

    def to_do(self, rows: range) -> NDArray[np.int64]:
        """int64: those of the rows that are not there yet."""
        return rows.start + np.flatnonzero(self.state[rows.start : rows.stop] == TO_DO)

    def write(self, rows: NDArray[np.int64], features: NDArray[np.float32], keys: Sequence[str]) -> None:
        """Keep features [R, D] of the images `keys` as these rows.

        Raises:
            InputError: they are not finite, or not in the store's type.
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
        if sum(map(len, self._unsaved)) >= _FLUSH:
            self.save()

    def mark_bad(self, rows: NDArray[np.int64]) -> None:
        """These rows stay empty: their images cannot be decoded."""
        self.state[rows] = BAD

    def save(self) -> None:
        """Put rows on the disk, then the word that they are there."""
        for array in (self.values, self.state):
            if isinstance(array, np.memmap):
                array.flush()
            if array is self.values:
                for rows in self._unsaved:
                    self.state[rows] = DONE
                self._unsaved = []


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
    """Make a store, or go on with the one that is there.

    Args:
        folder: where it lies.
        rows: images times views.
        width: D.
        dtype: of the features on disk.
        identity: what the features are of: JSON values that tell these from any others.
        world: the ranks that write into it.
        overwrite: delete a store of something else.

    Raises:
        InputError: it holds features of something else and `overwrite` is not set, or is no store.
        OSError: there is no room, or it cannot be written; nothing that was there is lost.
    """
    whole = {"rows": rows, "width": width, "dtype": dtype, **identity}
    world = world or World()
    world.run_on_rank0(lambda: _make(folder, whole, overwrite=overwrite))

    def mapped(name: str) -> NDArray[Any]:
        try:
            array: NDArray[Any] = np.load(folder / name, mmap_mode="r+")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder / name} cannot be read ({error}): delete the folder {folder}, or give the processes of all "
                "machines a folder that they share."
            ) from error
        return array

    return world.run_on_all(lambda: FeatureStore(folder, mapped("features.npy"), mapped("state.npy")))


def bytes_needed(rows: int, width: int, dtype: Dtype) -> int:
    """Size of a store on disk."""
    return rows * (width * np.dtype(dtype).itemsize + 1)


def _make(folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    described = folder / "identity.json"
    if described.exists():
        try:
            there = json.loads(described.read_text())
        except ValueError:
            there = None
        if there == json.loads(json.dumps(identity)):
            return
        if not overwrite:
            differs = [name for name in identity if not isinstance(there, dict) or there.get(name) != identity[name]]
            raise InputError(
                f"{folder} holds features of something else ({', '.join(differs)} differ): add --overwrite to replace "
                "them, or choose another place with --out."
            )
        described.unlink()
    elif folder.is_dir() and any(path.name not in ("features.npy", "state.npy") for path in folder.iterdir()):
        raise InputError(
            f"{folder} exists and holds other files, so it is left alone: choose another place with --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _allocate(folder / "features.npy", (identity["rows"], identity["width"]), identity["dtype"])
    _allocate(folder / "state.npy", (identity["rows"],), "uint8")
    write_json(described, dict(identity))


def _allocate(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Make an array of zeros whose room on the disk is its own: writing to a mapped file must not find the disk full.

    Raises:
        OSError: there is no room; no file is left then.
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


ENDINGS = (".npy", ".parquet")
_ROWS = 65_536  # rows at a time, so that memory does not grow with the data


def check_ending(out: Path) -> None:
    """Check that features can be written so.

    Raises:
        InputError: the ending is unknown, or pyarrow is missing.
    """
    if out.suffix not in ENDINGS:
        raise InputError(f"OUT is {str(out)!r} but must end in {' or '.join(ENDINGS)}: choose one.")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError("OUT is a Parquet file, which needs pyarrow: pip install pyarrow, or write .npy.")


def write_table(out: Path, store: FeatureStore, source: Source) -> int:
    """Write the rows that are there, in the order of the images; gives their number.

    .npy: float [M, D], and OUT.csv with the columns row, key, label (-1: none) and class. Parquet: the columns key,
    label, class and feature (a list of D numbers).

    Raises:
        OSError: it cannot be written; an earlier file of that name is untouched then.
    """
    rows = np.flatnonzero(store.state == DONE)
    aside = out.with_name(f".{out.name}")
    try:
        if out.suffix == ".parquet":
            _write_parquet(aside, store, source, rows)
        else:
            _write_npy(aside, store, rows)
            table = out.with_suffix(".csv")
            _write_keys(aside.with_suffix(".csv"), source, rows)
            aside.with_suffix(".csv").replace(table)
        aside.replace(out)
    finally:
        for leftover in (aside, aside.with_suffix(".csv")):
            leftover.unlink(missing_ok=True)
    return len(rows)


def _write_npy(path: Path, store: FeatureStore, rows: NDArray[np.int64]) -> None:
    if len(rows) == len(store.state):
        shutil.copyfile(store.folder / "features.npy", path)
        return
    with path.open("wb") as file:
        header = {"descr": store.values.dtype.str, "fortran_order": False, "shape": (len(rows), store.values.shape[1])}
        np.lib.format.write_array_header_1_0(file, header)
        for some in _parts(rows):
            file.write(np.ascontiguousarray(store.values[some]).tobytes())


def _write_keys(path: Path, source: Source, rows: NDArray[np.int64]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "key", "label", "class"))
        for number, index in enumerate(rows.tolist()):
            writer.writerow((number, source.key(index), *_label(source, index)))


def _write_parquet(path: Path, store: FeatureStore, source: Source, rows: NDArray[np.int64]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = store.values.shape[1]
    kind = pa.float16() if store.values.dtype == np.float16 else pa.float32()
    schema = pa.schema(
        [("key", pa.string()), ("label", pa.int64()), ("class", pa.string()), ("feature", pa.list_(kind, width))]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for some in _parts(rows):
            features = pa.array(np.ascontiguousarray(store.values[some]).reshape(-1), type=kind)
            labels = [_label(source, index) for index in some.tolist()]
            columns: list[Any] = [
                pa.array([source.key(index) for index in some.tolist()]),
                pa.array([label for label, _ in labels], type=pa.int64()),
                pa.array([name for _, name in labels], type=pa.string()),
                pa.FixedSizeListArray.from_arrays(features, width),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _label(source: Source, index: int) -> tuple[int, str]:
    label = int(source.labels[index])
    return label, source.classes[label] if label >= 0 else ""


def _parts(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for at in range(0, len(rows), _ROWS):
        yield rows[at : at + _ROWS]


def not_finite(key: str) -> InputError:
    """What to say of an image whose features are NaN or infinite."""
    return InputError(
        f"The features of {key} are not finite numbers (NaN or infinite): the weights have diverged, or the number "
        "format is too narrow for them; try --precision fp32, or another checkpoint."
    )
