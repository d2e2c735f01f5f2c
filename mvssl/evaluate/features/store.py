"""Features of a data set on disk, computed once: any number of images, and a stopped computation goes on.

A folder with features.npy (one row for each image and view), state.npy (whether the row is there) and identity.json
(of what). Several ranks write rows of their own into the same files, which have to lie on a file system they share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mvssl.distributed import World
from mvssl.evaluate.features.extract import not_finite
from mvssl.runs.folder import write_json
from pipelines.errors import InputError

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
    world.on_main(lambda: _make(folder, whole, overwrite=overwrite))

    def mapped(name: str) -> NDArray[Any]:
        try:
            array: NDArray[Any] = np.load(folder / name, mmap_mode="r+")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder / name} cannot be read ({error}): delete the folder {folder}, or give the processes of all "
                "machines a folder that they share."
            ) from error
        return array

    return world.together(lambda: FeatureStore(folder, mapped("features.npy"), mapped("state.npy")))


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
