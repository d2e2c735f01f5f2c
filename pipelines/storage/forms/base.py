"""What the forms share: a source over an index and a reader, the numbering of labels, pixels as PNG."""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.decode.limits import beyond_bytes
from pipelines.names import utf8
from pipelines.progress import counted as counted  # for the forms
from pipelines.runtime import InputError
from pipelines.storage.image_facts import ImageFacts
from pipelines.storage.source import KeyTable, ReadsAhead, Source, fingerprint

_log = logging.getLogger("mvssl.data")
NO_LABEL = "none"
"""Value of ``--label`` for images that are to have none."""
ROWS_KEPT = max(512, 16 * (os.cpu_count() or 1))
"""Rows that readers in order keep behind the last one: a conversion has four images in flight for each thread."""
_MOST_CLASSES = 1 << 20
_SPARSE = 4096  # numbers of classes without names; beyond, only the numbers in use become classes
LABEL_NAMES = ("label", "labels", "class", "class_id", "class_idx", "cls", "target", "targets", "category", "y")
"""Usual names of labels, the likeliest first."""
IMAGE_NAMES = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "picture", "photo", "x", "data")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user wants of a form.

    Attributes:
        image: name of the images where there are several (a column, component, data set or variant); None: find it.
        label: name of the labels; `NO_LABEL` for none; None: find it.
        progress: called with the number of images found so far.
    """

    image: str | None = None
    label: str | None = None
    progress: Callable[[int], None] | None = None

    def report(self, count: int) -> None:
        """Tell how many images were found so far."""
        if self.progress is not None:
            self.progress(count)


@dataclass(frozen=True, kw_only=True)
class Found:
    """An opened form.

    Attributes:
        what: what it is, for the user: "3 Parquet files (image column 'image')".
        splits: source by name: "train", "val", "test", or "" if there is one.
    """

    what: str
    splits: Mapping[str, Source]


class Reader(Protocol):
    """Random access to the images of a form by row; callable from several threads."""

    def read(self, row: int) -> Any:
        """Encoded image (bytes, memoryview or uint8 [bytes]) or pixels (uint8 [H, W], [H, W, 3]; uint16 [H, W]).

        Raises:
            OSError: this image cannot be read; others may be readable.
            InputError: the data are damaged.
        """

    def close(self) -> None:
        """Release open files."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranges:
    """Where encoded images lie, unchanged, in plain files.

    Attributes:
        paths: the files.
        file: int64 [N], index in `paths` of each image.
        offset, size: int64 [N], in bytes.
        checksums: uint32 [N], CRC-32 of each image; None if the form has none.
    """

    paths: tuple[Path, ...]
    file: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint32] | None = None

    def rows(self, rows: npt.NDArray[np.int64]) -> Ranges:
        """Those of some rows, int64 [M]."""
        sums = None if self.checksums is None else self.checksums[rows]
        return Ranges(
            paths=self.paths, file=self.file[rows], offset=self.offset[rows], size=self.size[rows], checksums=sums
        )


@runtime_checkable
class HasRanges(Protocol):
    """A reader whose images lie as they are in plain files, so that they can be read without it."""

    def ranges(self) -> Ranges | None:
        """Of all rows; None if they do not, as in compressed archives."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels int64 [N] (-1 for none), and class names by label."""

    values: npt.NDArray[np.int64]
    classes: tuple[str, ...] = ()


class FormSource:
    """Images that a `Reader` reads. Implements `Source`; pixels become PNG, which loses nothing."""

    def __init__(
        self,
        location: Path,
        *,
        keys: Iterable[str] | KeyTable,
        labels: Labels,
        nbytes: npt.NDArray[np.int64],
        reader: Reader,
        rows: npt.NDArray[np.int64] | None = None,
        deep: Sequence[int] | None = None,
        largest: int | None = None,
    ) -> None:
        """Put an index over a reader.

        Args:
            location: of the data; exists.
            keys: name of each image.
            labels: of each image.
            nbytes: int64 [N], of each image; estimated from sums where the form does not say them.
            reader: reads by row.
            rows: int64 [N], row of each image; None: the same number.
            deep: indices of images that may have more than 8 bits; None if that is not known.
            largest: bytes that no image exceeds, if `nbytes` is estimated.
        """
        self.location = location
        self.labels = labels.values
        self.classes = tuple(map(utf8, labels.classes))
        self.nbytes = np.maximum(nbytes.astype(np.int64), 1)
        self.deep = deep
        self.largest = int(np.max(self.nbytes, initial=1)) if largest is None else largest
        self.keys = keys if isinstance(keys, KeyTable) else KeyTable.of(keys)
        self.reader = reader
        self._rows = rows
        if not len(self.keys):
            raise InputError(f"{location} holds no images: give data with one image or more.")
        self.facts = ImageFacts.of(len(self.keys), exact_sizes=largest is None)
        self.fingerprint = fingerprint(self.keys, labels=self.labels, nbytes=self.nbytes, classes=self.classes)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Encoded image: uint8 [bytes]."""
        problem = beyond_bytes(int(self.nbytes[index]), self.facts.limits) if self.facts.exact_sizes else ""
        if problem:  # before memory is used for it
            raise OSError(errno.EFBIG, problem)
        item = self.reader.read(index if self._rows is None else int(self._rows[index]))
        if isinstance(item, np.ndarray) and (item.ndim != 1 or item.dtype != np.uint8):
            item = as_png(item)
        data = item if isinstance(item, np.ndarray) else np.frombuffer(item, np.uint8)
        problem = beyond_bytes(len(data), self.facts.limits)
        if problem:
            raise OSError(errno.EFBIG, problem)
        return data

    def will_need(self, indices: Sequence[int]) -> None:
        """See `ReadsAhead`; of use to readers that can."""
        if isinstance(self.reader, ReadsAhead):
            self.reader.will_need(indices if self._rows is None else self._rows[np.asarray(indices)].tolist())

    def ranges(self) -> Ranges | None:
        """Where the images lie in plain files; None if they do not."""
        found = self.reader.ranges() if isinstance(self.reader, HasRanges) else None
        return found if found is None or self._rows is None else found.rows(self._rows)

    def key(self, index: int) -> str:
        """Name of an image."""
        return utf8(self.keys[index])

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


def unreadable(why: str) -> OSError:
    """The error for one image that cannot be read, whose neighbours may be readable."""
    return OSError(errno.EIO, why)


def as_png(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """PNG of pixels (uint8 [H, W] or [H, W, 1], 3 or 4 channels; uint16 [H, W]; bool): uint8 [bytes].

    Raises:
        OSError: they have another shape or type.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    gray = pixels.ndim == 2 and pixels.dtype in (np.uint8, np.uint16)
    if not pixels.size or not (gray or (pixels.ndim == 3 and pixels.shape[2] in (3, 4) and pixels.dtype == np.uint8)):
        raise unreadable(f"pixels of {pixels.dtype} {list(pixels.shape)} are no image (uint8 [H, W] or [H, W, 3])")
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=1)
    return np.frombuffer(file.getvalue(), np.uint8)


def need(module: str, what: str) -> Any:
    """An optional library.

    Raises:
        InputError: it is not installed.
    """
    try:
        loaded: ModuleType = importlib.import_module(module)
        return loaded
    except ImportError as error:
        raise InputError(
            f"{what} needs the package {module.partition('.')[0]}, which cannot be imported ({error}): "
            "pip install 'mvssl[formats]'."
        ) from None


def number_labels(
    found: Sequence[Any] | npt.NDArray[Any], *, where: object, names: Sequence[str] | None = None
) -> Labels:
    """Labels of what a data set says for each image.

    Args:
        found: integers, names or None (no label) of each image; mixed kinds are names.
        where: the data, for messages.
        names: class name of each integer, if they are known.

    Raises:
        InputError: an integer is negative (-1 is no label), has no name, or is beyond any number of classes.
    """
    if isinstance(found, np.ndarray) and found.dtype.kind in "iub":
        values = found.astype(np.int64)
    elif all(isinstance(one, (int, np.integer)) or one is None for one in found):
        try:
            values = np.array([-1 if one is None else int(one) for one in found], dtype=np.int64)
        except OverflowError:
            raise InputError(f"{where} has labels beyond 64 bits: name the labels with --label.") from None
    else:
        return _numbered_names(found, names, where)
    highest = int(np.max(values, initial=-1))
    lowest = int(np.min(values, initial=0))
    count = _MOST_CLASSES if names is None else len(names)
    if lowest < -1 or highest >= count:
        wrong = np.flatnonzero((values < -1) | (values >= count))
        raise InputError(
            f"{where} has the label {values[wrong[0]]} (image {wrong[0]}) but labels must be 0 to {count - 1:,}, or -1 "
            "for none: correct the labels, or name others with --label."
        )
    if highest < 0:
        return Labels(values=values)
    _tell_missing(values, where)
    if names is not None:
        return Labels(values=values, classes=tuple(names))
    if highest < _SPARSE:
        return Labels(values=values, classes=tuple(map(str, range(highest + 1))))
    used = np.unique(values[values >= 0])
    numbered = np.where(values < 0, -1, np.searchsorted(used, values))
    return Labels(values=numbered.astype(np.int64), classes=tuple(map(str, used.tolist())))


def _numbered_names(found: Iterable[Any], names: Sequence[str] | None, where: object) -> Labels:
    texts = [None if one is None else one if isinstance(one, str) else str(one) for one in found]
    used = set(texts) - {None}
    known = set(names or ())
    classes = tuple(names) if names is not None and used <= known else tuple(sorted(one for one in used if one))
    label_of: dict[str | None, int] = {None: -1, "": -1, **{name: label for label, name in enumerate(classes)}}
    values = np.array([label_of[text] for text in texts], dtype=np.int64)
    _tell_missing(values, where)
    return Labels(values=values, classes=classes)


def _tell_missing(values: npt.NDArray[np.int64], where: object) -> None:
    missing = int(np.count_nonzero(values < 0))
    if 0 < missing < len(values):
        _log.warning(
            "%s: %s of %s images have no label: they train, and kNN leaves them out", where, missing, len(values)
        )


def unlabelled(count: int) -> Labels:
    """No labels."""
    return Labels(values=np.full(count, -1, dtype=np.int64))
