"""HDF5: groups of encoded images by class, as solo-learn writes them, or arrays of images beside one of labels."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.runtime import InputError
from pipelines.storage.file_index import begins_as_image
from pipelines.storage.forms.base import (
    IMAGE_NAMES,
    LABEL_NAMES,
    NO_LABEL,
    FormSource,
    Found,
    Labels,
    Request,
    counted,
    need,
    number_labels,
    unlabelled,
    unreadable,
)
from pipelines.storage.forms.look import File, Look, by_split
from pipelines.storage.forms.parquet import may_be_deep_name
from pipelines.storage.splits import split_role

_MAGIC = b"\x89HDF\r\n\x1a\n"
_LABELS = (*LABEL_NAMES, "ans", "targets", "train_y", "test_y")
_KEPT = 4  # blocks of an array
_BLOCK = 1 << 24  # bytes of an array read at a time
_SHOWN = 12
_LARGEST_PIECE = 1 << 31  # bytes of an image, or of a chunk, which is read as a whole
_MOST_UNSAID, _LARGEST_RATIO = 1 << 28, 1100  # bytes of an array whose values are not written, or compressed
_OPENED = 8  # images of a class that are looked at when a file is indexed
LOCAL_ONLY = True  # its library maps files of a disk


def recognise(look: Look) -> bool:
    """Whether a file begins as HDF5."""
    return bool(_files(look))


def _files(look: Look) -> list[File]:
    return [f for f in look.files if f.head.startswith(_MAGIC) or f.name.lower().endswith((".h5", ".hdf5"))]


def open_form(look: Look, request: Request) -> Found:
    """Open the splits that the files' names say, or else the groups at the top of the only file."""
    files = _files(look)
    splits: dict[str, FormSource] = {}
    for name, of_split in by_split(look, files).items():
        if len(of_split) > 1:
            raise InputError(
                f"{look.path} has several HDF5 files ({of_split[0].name}, {of_split[1].name}) for one split: give one."
            )
        found = _open(look.path, of_split[0], request)
        if name and len(found) > 1:
            raise InputError(f"{look.path} has splits in the names of its files and in these: give one file.")
        splits.update({name or inner: source for inner, source in found.items()})
    return Found(what=counted(len(files), "HDF5 file"), splits=splits)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors of the library, which are OSErrors, RuntimeErrors and KeyErrors."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, PermissionError | FileNotFoundError):
            raise
        text = str(error).split("\n")[0].strip("'\"")[:200]
        raise InputError(f"{path} is truncated or damaged, or no HDF5 ({text}): copy or download it again.") from None


def _open(location: Path, file: File, request: Request) -> dict[str, FormSource]:
    h5py = need("h5py", "Reading HDF5")
    with _naming(file.path):
        opened = h5py.File(file.path, "r")
        members = {name: opened[name] for name in opened if opened.get(name, getlink=True).__class__ is h5py.HardLink}
        groups = {name: one for name, one in members.items() if isinstance(one, h5py.Group)}
        arrays = {name: one for name, one in members.items() if isinstance(one, h5py.Dataset)}
        if arrays and not (groups and _are_images(h5py, groups)):
            return {"": _array(location, file, arrays, request)}
        roles = {name: split_role(name) for name in groups}
        if "train" in roles.values() and all(roles.values()):
            splits = {}
            for name, group in groups.items():
                inner = {key: group[key] for key in group if isinstance(group[key], h5py.Dataset)}
                nested = {key: group[key] for key in group if isinstance(group[key], h5py.Group)}
                role = roles[name]
                split = name if role in (None, "more") else str(role)
                splits[split] = (
                    _classes(location, h5py, file.path, nested, request)
                    if nested
                    else _array(location, file, inner, request)
                )
            return splits
        if not groups:
            raise InputError(f"{file.path} is empty: give an HDF5 file of images.")
        return {"": _classes(location, h5py, file.path, groups, request)}


def _are_images(h5py: Any, groups: dict[str, Any]) -> bool:
    """Whether the first data set of the first group is an encoded image."""
    for group in groups.values():
        for name in group:
            one = group[name]
            return isinstance(one, h5py.Dataset) and begins_as_image(_bytes(one)[:64])
    return False


def _check_own(dataset: Any) -> None:
    """Check that a data set lies in its file, in pieces that memory holds; ValueError."""
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} lies in other files, which are not read: h5repack writes it into one")
    piece = dataset.dtype.itemsize * math.prod(dataset.chunks or (1,))
    if piece > _LARGEST_PIECE:
        raise ValueError(f"{dataset.name} has pieces of {piece:,} bytes")


def _whole(dataset: Any) -> Any:
    """What is in a data set; ValueError if it is larger than any image, or lies in another file."""
    _check_own(dataset)
    if dataset.nbytes > _LARGEST_PIECE:
        raise ValueError(f"{dataset.name} has {dataset.nbytes:,} bytes")
    return dataset[()]


def _bytes(dataset: Any) -> bytes:
    """The encoded image in a data set: uint8 [bytes], or one value of opaque, vlen or text type."""
    value = _whole(dataset)
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.void):
        return value.tobytes()
    if isinstance(value, np.ndarray) and value.dtype.kind in "uiV" and value.dtype.itemsize == 1:
        return value.tobytes()
    if isinstance(value, np.ndarray) and value.size == 1:
        one = value.reshape(-1)[0]
        return bytes(one) if isinstance(one, bytes) else np.asarray(one).tobytes()
    return b""


def _classes(location: Path, h5py: Any, path: Path, groups: dict[str, Any], request: Request) -> FormSource:
    """Groups of images by class: ``/class/name``, uint8 [bytes] each, or pixels uint8 [H, W, 3]."""
    if request.label not in (None, NO_LABEL):
        raise InputError(
            f"--label is {request.label!r} but must be none or left out: classes of {path} are its groups.",
            field="--label",
        )
    keys: list[str] = []
    names: list[str] = []
    sizes: list[int] = []
    for group in sorted(groups):
        for number, name in enumerate(sorted(groups[group])):
            if number < _OPENED:  # opening an object costs as much as reading a small image
                one = groups[group][name]
                if not isinstance(one, h5py.Dataset):
                    raise InputError(
                        f"{path} has the group {group}/{name} where images should be: give a file of groups of images "
                        "by class (/class/image)."
                    )
                sizes.append(int(one.nbytes) if one.dtype.kind != "O" else 0)
            keys.append(f"{group}/{name}")
            names.append(group)
            if len(keys) % 10_000 == 0:
                request.report(len(keys))
    if not keys:
        raise InputError(f"{path} has groups but no images in them: give a file with images.")
    labels = unlabelled(len(keys)) if request.label == NO_LABEL else number_labels(names, where=location)
    mean = sum(sizes) // len(sizes)  # enough to plan shards
    top = next(iter(groups.values())).parent.name.rstrip("/")
    return FormSource(
        location,
        keys=keys,
        labels=labels,
        nbytes=np.full(len(keys), mean, dtype=np.int64),
        largest=max(1 << 24, 8 * mean),
        reader=GroupReader(path, keys, top),
        deep=[n for n, key in enumerate(keys) if may_be_deep_name(key)],
    )


def _array(location: Path, file: File, arrays: dict[str, Any], request: Request) -> FormSource:
    """An array of pixels [N, H, W(, C)] or [N, C, H, W], or of encoded images [N], beside labels [N]."""
    path = file.path
    for one in arrays.values():
        _check_own(one)
        if one.nbytes > max(_MOST_UNSAID, _LARGEST_RATIO * file.size):
            raise ValueError(f"{one.name} says {one.nbytes:,} bytes and the file has {file.size:,}")
    images = {name: one for name, one in arrays.items() if _holds_images(one)}
    if request.image is not None:
        if request.image not in images:
            raise InputError(
                f"--image is {request.image!r} but must be a data set of images in {path} "
                f"({', '.join(images) or 'there is none'}): choose one of these.",
                field="--image",
            )
        chosen = request.image
    elif len(images) == 1:
        chosen = next(iter(images))
    else:
        usual = [name for name in IMAGE_NAMES if name in images]
        if not usual:
            raise InputError(
                f"{path} has {'several' if images else 'no'} data sets of images among {_described(arrays)}: "
                + (f"choose one, such as --image {next(iter(images))}." if images else "give a file of images.")
            )
        chosen = usual[0]
    data = arrays[chosen]
    count = len(data)
    label = _label(path, arrays, chosen, count, request)
    labels = unlabelled(count) if label is None else _numbered(arrays[label], location)
    encoded = data.ndim == 1
    # Sizes of encoded images are known when they are read: a mean of some is enough to plan shards.
    mean = max(1, sum(len(_one(data[n])) for n in range(min(8, count))) // min(8, count)) if encoded else 0
    size = mean if encoded else int(np.prod(data.shape[1:])) * data.dtype.itemsize
    deep: Sequence[int] | None = () if data.dtype == np.uint8 else None if encoded else range(count)
    return FormSource(
        location,
        keys=(f"{chosen}/{row:08d}" for row in range(count)),
        labels=labels,
        nbytes=np.full(count, size, dtype=np.int64),
        reader=ArrayReader(path, data.name, size),
        deep=deep,
        largest=max(1 << 23, 4 * size) if encoded else 2 * size + 1024,
    )


def _holds_images(data: Any) -> bool:
    if data.ndim in (3, 4) and data.dtype in (np.uint8, np.uint16) and len(data):
        return data.ndim == 3 or 1 in data.shape[1::2] or bool({3, 4} & {data.shape[1], data.shape[3]})
    return data.ndim == 1 and len(data) > 0 and data.dtype.kind in "OSV" and begins_as_image(_one(data[0])[:64])


def _one(value: Any) -> bytes:
    """One encoded image of an array."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    return bytes(value) if isinstance(value, bytes) else np.asarray(value).tobytes()


def _label(path: Path, arrays: dict[str, Any], chosen: str, count: int, request: Request) -> str | None:
    usable = [
        name for name, one in arrays.items() if name != chosen and one.shape in ((count,), (count, 1), (count, 1, 1, 1))
    ]
    if request.label == NO_LABEL:
        return None
    if request.label is not None:
        if request.label in usable:
            return request.label
        raise InputError(
            f"--label is {request.label!r} but must be a data set of {count:,} labels in {path} "
            f"({', '.join(usable) or 'there is none'}): choose one of these, or none.",
            field="--label",
        )
    named = [name for name in _LABELS if name in arrays]
    wrong = [name for name in named if name not in usable]
    if wrong and not any(name in usable for name in named):
        raise InputError(
            f"{path} has {count} images in {chosen!r} and {list(arrays[wrong[0]].shape)} labels in {wrong[0]!r}: name "
            "others with --label, or use --label none."
        )
    return next((name for name in named if name in usable), None)


def _numbered(data: Any, location: Path) -> Labels:
    values = data[()].reshape(-1)
    if values.dtype.kind == "f" and np.array_equal(values, np.floor(values)):
        values = values.astype(np.int64)
    if values.dtype.kind in "iub":
        return number_labels(values, where=location)
    texts = [one.decode("utf-8", "replace") if isinstance(one, bytes) else str(one) for one in values.tolist()]
    return number_labels(texts, where=location)


def _described(arrays: dict[str, Any]) -> str:
    return ", ".join(f"{name} {one.dtype}{list(one.shape)}" for name, one in list(arrays.items())[:_SHOWN])


class _Opened:
    """A file that is opened when it is first read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: Any = None

    def _open(self) -> Any:
        """The file; under the lock."""
        if self._file is None:
            with _naming(self._path):
                self._file = need("h5py", "Reading HDF5").File(self._path, "r")
        return self._file

    def close(self) -> None:
        """See `Reader`."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


class GroupReader(_Opened):
    """Reads images that are data sets of their own."""

    def __init__(self, path: Path, keys: list[str], top: str) -> None:
        super().__init__(path)
        self._keys = keys
        self._top = top

    def read(self, row: int) -> Any:
        """See `Reader`."""
        with self._lock:
            try:
                dataset = self._open()[f"{self._top}/{self._keys[row]}"]
                if dataset.file.filename != self._open().filename:
                    raise ValueError("it lies in another file")
                return _whole(dataset) if dataset.ndim > 1 else _bytes(dataset)
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                raise unreadable(f"it cannot be unpacked ({str(error)[:100]})") from None


class ArrayReader(_Opened):
    """Reads rows of an array, in blocks, of which the last ones are kept."""

    def __init__(self, path: Path, name: str, size: int) -> None:
        super().__init__(path)
        self._name = name
        self._rows = max(1, min(256, _BLOCK // max(1, size)))
        self._kept: dict[int, Any] = {}

    def read(self, row: int) -> Any:
        """See `Reader`."""
        start = row // self._rows * self._rows
        with self._lock:
            block = self._kept.get(start)
            if block is None:
                data = self._open()[self._name]
                try:
                    block = data[start : start + self._rows]
                except (OSError, RuntimeError, ValueError) as error:
                    raise unreadable(f"it cannot be unpacked ({str(error)[:100]})") from None
                self._kept[start] = block
                while len(self._kept) > _KEPT:
                    del self._kept[next(iter(self._kept))]
        item = block[row - start]
        if block.ndim == 1:
            return _one(item)
        planes = item.ndim == 3 and item.shape[0] in (1, 3, 4) and item.shape[2] not in (1, 3, 4)
        return item.transpose(1, 2, 0) if planes else item
