"""Features of any images as a file that other programs read: .npy with a .csv of keys beside it, or Parquet."""

from __future__ import annotations

import csv
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvssl.evaluate.features.store import DONE, FeatureStore
from pipelines.errors import InputError
from pipelines.storage.source import Source

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
