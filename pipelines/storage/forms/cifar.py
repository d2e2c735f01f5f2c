"""CIFAR-10 and CIFAR-100 as downloaded: the Python and the binary version, packed or unpacked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.runtime import InputError
from pipelines.storage.forms.base import (
    NO_LABEL,
    FormSource,
    Found,
    Labels,
    Request,
    number_labels,
    unlabelled,
)
from pipelines.storage.forms.blobs import text_of
from pipelines.storage.forms.look import File, Look
from pipelines.storage.forms.places import Place, RecordReader, check_published, find_places, first_member
from pipelines.storage.forms.safe_pickle import RefusedPickleError, load_plain

SIDE, _PIXELS = 32, 3 * 32 * 32
_FINE, _COARSE = ("fine", "fine_label", "fine_labels"), ("coarse", "coarse_label", "coarse_labels")
_NAME = re.compile(
    r"(data_batch_\d+|test_batch|train|test)(\.bin)?|batches\.meta(\.txt)?|meta|(fine|coarse)_label_names\.txt"
)
_MEMBER = re.compile(
    r"(^|/)cifar-100?-(batches-)?(py|python|bin|binary)/|(^|/)(data_batch_\d|test_batch|batches\.meta)"
)
_PICKLE_KEYS = (b"data", b"batch_label", b"labels", b"filenames")
_PUBLISHED = {  # images and MD5 of the files of the Python version
    "data_batch_1": (10_000, "c99cafc152244af753f735de768cd75f"),
    "data_batch_2": (10_000, "d4bba439e000b95fd0a9bffe97cbabec"),
    "data_batch_3": (10_000, "54ebc095f3ab1f0389bbae665268c751"),
    "data_batch_4": (10_000, "634d18415352ddfa80567beed471001a"),
    "data_batch_5": (10_000, "482c414d41f54cd18b22e5b47cb7c3cb"),
    "test_batch": (10_000, "40351d587109b95175f43aff81a1287e"),
    "train": (50_000, "16019d7e3df5f24257cddd939b257f8d"),
    "test": (10_000, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
}


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """One file of images: labels by kind, names of the images, pixels (None if they are read from the file)."""

    place: Place
    labels: dict[str, np.ndarray]
    names: list[str]
    pixels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.names)


def recognise(look: Look) -> bool:
    """Whether there are CIFAR's batches: pickles of that kind, records behind label bytes, or an archive of these."""
    return any(_is_batch(file) or _MEMBER.search(_first(file)) for file in look.files)


def _first(file: File) -> str:
    return "" if file.head.startswith(b"\x80") else first_member(file)


def _is_batch(file: File) -> bool:
    base = file.name.rpartition("/")[2]
    if not _NAME.fullmatch(base):
        return False
    if base.endswith(".bin"):
        return _label_bytes(file.size, base) > 0
    return file.head.startswith(b"\x80") and any(key in file.head for key in _PICKLE_KEYS)


def _label_bytes(size: int, base: str) -> int:
    """Bytes of labels in front of each image of a binary file; 0 if its size fits neither data set."""
    wanted = 1 if "batch" in base else 2
    return wanted if size and size % (_PIXELS + wanted) == 0 else 0


def open_form(look: Look, request: Request) -> Found:
    """Open the train and test images; labels are the fine ones, or with ``--label coarse`` the coarse ones."""
    if request.image is not None:
        raise InputError(f"--image is {request.image!r} but must be left out for CIFAR: leave it out.", field="--image")
    places = find_places(look, _NAME)
    batches: dict[str, list[_Batch]] = {}
    names: dict[str, tuple[str, ...]] = {}
    count = 0
    seen: dict[str, Place] = {}
    for place in sorted(places, key=lambda place: place.base):
        base = place.base
        if seen.setdefault(base, place).size == place.size and seen[base] is not place:
            continue  # torchvision keeps the archive beside the folder that it unpacks
        if base.endswith(".txt"):
            text = text_of(place.path, place.read())
            kind = base.partition("_")[0] if "_" in base else "fine"
            names[kind] = tuple(line.strip() for line in text.split("\n") if line.strip())
        elif base.endswith(".bin"):
            batches.setdefault(_split(base), []).append(_binary(place))
        else:
            content = _pickled(place)
            if "meta" in base:
                for kind, key in (
                    ("fine", "label_names"),
                    ("fine", "fine_label_names"),
                    ("coarse", "coarse_label_names"),
                ):
                    if _all(content.get(key), str):
                        names[kind] = tuple(content[key])
            else:
                batches.setdefault(_split(base), []).append(_python(place, content))
        count = sum(map(len, (batch for group in batches.values() for batch in group)))
        request.report(count)
    if not batches:
        raise InputError(f"{look.path} has no batches of CIFAR: give the file as downloaded, or the folder of batches.")
    versions = {("coarse" in batch.labels, batch.pixels is None) for group in batches.values() for batch in group}
    if len(versions) > 1:
        raise InputError(
            f"{look.path} holds CIFAR-10 and CIFAR-100, or both versions of one, but must hold one data set: give the "
            "archive or the folder of one."
        )
    _check_whole(look, batches.get("train", []))
    hundred = any("coarse" in batch.labels for group in batches.values() for batch in group)
    splits: dict[str, FormSource] = {
        split: _source(look, batches[split], _kind(request, hundred, look), names)
        for split in ("train", "test")
        if split in batches
    }
    if len(splits) == 1:
        splits = {"": next(iter(splits.values()))}
    version = "binary" if any(batch.pixels is None for group in batches.values() for batch in group) else "Python"
    kind = _kind(request, hundred, look)
    labels = f", {kind} labels" if hundred and kind else ""
    return Found(what=f"CIFAR-{100 if hundred else 10} ({version} version{labels})", splits=splits)


def _check_whole(look: Look, batches: list[_Batch]) -> None:
    """Raise InputError if one of CIFAR-10's five files of training images is missing. Subsets may have fewer."""
    numbers = {int(batch.place.base.removesuffix(".bin")[-1]) for batch in batches if "_batch_" in batch.place.base}
    last = 5 if any(len(batch) == _PUBLISHED["data_batch_1"][0] for batch in batches) else max(numbers, default=0)
    missing = [number for number in range(1, last + 1) if number not in numbers]
    if numbers and missing:
        raise InputError(
            f"{look.path} has {len(numbers)} of CIFAR-10's {last} batches but not data_batch_{missing[0]}: copy that "
            "file too, or download the archive again."
        )


def _kind(request: Request, hundred: bool, look: Look) -> str:
    """The labels to use: "fine", "coarse", or "" for none."""
    if request.label is None or request.label in ("label", "labels", *_FINE):
        return "fine"
    if request.label == NO_LABEL:
        return ""
    if request.label in _COARSE and hundred:
        return "coarse"
    allowed = "fine, coarse or none" if hundred else "none, or left out"
    raise InputError(
        f"--label is {request.label!r} but must be {allowed} for {look.path}: choose one of these.", field="--label"
    )


def _split(base: str) -> str:
    return "test" if base.startswith("test") else "train"


def _pickled(place: Place) -> dict[str, Any]:
    try:
        content = load_plain(place.read())
    except RefusedPickleError as error:
        raise InputError(f"{place.path}: {place.base} is no batch of CIFAR: {error}; download it again.") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{place.path}: {place.base} is no batch of CIFAR but a {type(content).__name__}: download it."
        )
    return {
        key.decode("latin1") if isinstance(key, bytes) else key: [_text(one) for one in value]
        if isinstance(value, list)
        else value
        for key, value in content.items()
        if isinstance(key, (bytes, str))
    }


def _all(values: Any, *kinds: type) -> bool:
    """Whether it is a list of such values; lists in lists could stand for more than memory holds."""
    return isinstance(values, list) and all(isinstance(one, kinds) for one in values)


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _python(place: Place, content: dict[str, Any]) -> _Batch:
    """A batch of the Python version: `data` is uint8 [N, 3072], the planes of red, green and blue."""
    data = content.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim < 2 or data[0:1].size != _PIXELS:
        found = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(
            f"{place.path}: the images of {place.base} are {found} but must be uint8 [N, {_PIXELS}]: download it again."
        )
    labels = {}
    for kind, key in (("fine", "labels"), ("fine", "fine_labels"), ("coarse", "coarse_labels")):
        if key in content:
            try:
                if not isinstance(content[key], np.ndarray) and not _all(content[key], int, np.integer):
                    raise TypeError
                labels[kind] = np.array(content[key], dtype=np.int64)
            except (ValueError, TypeError, OverflowError):
                raise InputError(f"{place.path}: the {key} of {place.base} are no integers: download it.") from None
            if labels[kind].shape != (len(data),):
                raise InputError(
                    f"{place.path}: {place.base} has {len(data):,} images and {labels[kind].size:,} {key}: download it "
                    "again."
                )
    published = _PUBLISHED.get(place.base)
    if published is not None and published[0] == len(data):
        check_published(place, published[1])
    names: Any = content.get("filenames")
    if not _all(names, str) or len(names) != len(data):
        names = [f"{place.base}/{row:05d}" for row in range(len(data))]
    return _Batch(place=place, labels=labels, names=names, pixels=data.reshape(-1, 3, SIDE, SIDE))


def _binary(place: Place) -> _Batch:
    """A batch of the binary version: one or two label bytes, and the planes of each image."""
    head = 1 if "batch" in place.base else 2
    stride = head + _PIXELS
    count = place.whole(0, stride, "images")
    found = np.empty((count, head), np.int64)
    step = 1000
    for row in range(0, count, step):
        rows = min(step, count - row)
        data = np.frombuffer(place.read(rows * stride, row * stride), np.uint8).reshape(rows, stride)
        found[row : row + rows] = data[:, :head]
    labels = {"fine": found[:, -1]} if head == 1 else {"coarse": found[:, 0], "fine": found[:, 1]}
    stem = place.base.removesuffix(".bin")
    return _Batch(place=place, labels=labels, names=[f"{stem}/{row:05d}" for row in range(count)], pixels=None)


def _source(look: Look, batches: list[_Batch], kind: str, names: dict[str, tuple[str, ...]]) -> FormSource:
    count = sum(map(len, batches))
    if not kind:
        labels = unlabelled(count)
    else:
        missing = [batch.place.base for batch in batches if kind not in batch.labels]
        if missing:
            raise InputError(f"{look.path}: {missing[0]} has no {kind} labels: download it again, or use --label none.")
        values = np.concatenate([batch.labels[kind] for batch in batches])
        labels = number_labels(values, where=look.path, names=names.get(kind))
    keys = [name for batch in batches for name in batch.names]
    first = batches[0].place
    reader: Any
    if any(batch.pixels is None for batch in batches):
        head = 1 if "batch" in first.base else 2
        reader = RecordReader(
            [(batch.place, len(batch)) for batch in batches], start=0, stride=head + _PIXELS, decode=_Planes(head)
        )
    else:
        reader = PixelReader([batch.pixels for batch in batches if batch.pixels is not None])
    if kind and labels.classes:
        keys = [f"{labels.classes[v]}/{key}" for v, key in zip(labels.values.tolist(), keys, strict=True)]
    return FormSource(
        look.path,
        keys=keys,
        labels=Labels(values=labels.values, classes=labels.classes),
        nbytes=np.full(count, _PIXELS, dtype=np.int64),
        reader=reader,
        deep=(),
        largest=2 * _PIXELS,
    )


class _Planes:
    """Pixels, uint8 [32, 32, 3], of a record with some bytes of labels in front."""

    def __init__(self, head: int) -> None:
        self._head = head

    def __call__(self, record: bytes) -> np.ndarray:
        return np.frombuffer(record, np.uint8, offset=self._head).reshape(3, SIDE, SIDE).transpose(1, 2, 0)


class PixelReader:
    """Reads images out of arrays in memory, uint8 [N, 3, H, W]."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._arrays = arrays

    def read(self, row: int) -> np.ndarray:
        """See `Reader`."""
        for array in self._arrays:
            if row < len(array):
                pixels: np.ndarray = array[row].transpose(1, 2, 0)
                return pixels
            row -= len(array)
        raise IndexError(row)

    def close(self) -> None:
        """See `Reader`."""
