"""TFRecord files of `tf.train.Example`, as TensorFlow Datasets and ImageNet's scripts write it; no TensorFlow."""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import LARGEST_JSON, read_regular
from pipelines.runtime import InputError
from pipelines.storage.file_index import begins_as_image
from pipelines.storage.forms.base import (
    LABEL_NAMES,
    NO_LABEL,
    FormSource,
    Found,
    Labels,
    Request,
    counted,
    number_labels,
    unlabelled,
    unreadable,
)
from pipelines.storage.forms.blobs import text_of
from pipelines.storage.forms.look import File, Look, by_split
from pipelines.storage.forms.parquet import may_be_deep_name
from pipelines.storage.forms.wire import DamagedRecordError, example, first_bytes, first_int, masked_crc

_HEADER, _TAIL = struct.Struct("<QI"), struct.Struct("<I")
_IMAGES = ("image", "image/encoded", "image_raw", "encoded", "jpg", "img")
_LABELS = ("image/class/synset", "image/class/label", *LABEL_NAMES)
_NAMES = ("file_name", "filename", "image/filename", "id", "name", "key")
_REPORT_EVERY = 10_000
LOCAL_ONLY = True  # its library maps files of a disk


def recognise(look: Look) -> bool:
    """Whether a file begins with the length of a record and its checksum."""
    return bool(_files(look))


def _files(look: Look) -> list[File]:
    return [f for f in look.files if _is_record(f.head) or ".tfrecord" in f.name.lower()]


def _is_record(head: bytes) -> bool:
    return len(head) >= _HEADER.size and masked_crc(head[:8]) == _TAIL.unpack_from(head, 8)[0]


def open_form(look: Look, request: Request) -> Found:
    """Open the splits that the names of the files say."""
    files = _files(look)
    splits = {}
    what = ""
    for name, of_split in by_split(look, files).items():
        index = _Index(of_split, request)
        splits[name] = index.source(look, request)
        what = f"image feature {index.image!r}, {'no labels' if index.label is None else f'labels {index.label!r}'}"
    return Found(what=f"{counted(len(files), 'TFRecord file')} ({what})", splits=splits)


class _Index:
    """Where the images of several files are, their labels and names."""

    def __init__(self, files: Sequence[File], request: Request) -> None:
        self.files = files
        self.image = ""
        self.label: str | None = None
        self._name: str | None = None
        self.rows = {name: array("q") for name in ("file", "offset", "size", "image_size")}
        self.labels: list[int | str | None] = []
        self.keys: list[str] = []
        self.maps = [_mapped(file) for file in files]
        for number, (file, data) in enumerate(zip(files, self.maps, strict=True)):
            self._add(number, file, data, request)
        if not self.keys:
            raise InputError(f"{files[0].path} holds no records: give files with images.")
        request.report(len(self.keys))

    def _add(self, number: int, file: File, data: memoryview, request: Request) -> None:
        at, row = 0, 0
        while at < len(data):
            if len(data) - at < _HEADER.size:
                raise _damaged(file.path, f"it ends at byte {at:,} in the length of a record")
            size, crc = _HEADER.unpack_from(data, at)
            if masked_crc(data[at : at + 8]) != crc:
                raise _damaged(file.path, f"at byte {at:,} there is no length of a record")
            if size > len(data) - at - _HEADER.size - _TAIL.size:
                raise _damaged(file.path, f"it ends in the record at byte {at:,}")
            start = at + _HEADER.size
            try:
                features = example(data[start : start + size])
                if not self.image:
                    self._choose(features, file.path, request)
                self._record(features, file, row)
            except DamagedRecordError as error:
                raise _damaged(file.path, f"the record at byte {at:,} is no tf.train.Example: {error}") from None
            self.rows["file"].append(number)
            self.rows["offset"].append(start)
            self.rows["size"].append(size)
            row += 1
            at = start + size + _TAIL.size
            if len(self.keys) % _REPORT_EVERY == 0:
                request.report(len(self.keys))

    def _choose(self, features: dict[str, tuple[str, memoryview]], path: Path, request: Request) -> None:
        """Choose the features by the first record."""
        images = [
            name
            for name, (kind, values) in features.items()
            if kind == "bytes" and (one := first_bytes(values)) is not None and begins_as_image(bytes(one[:64]))
        ]
        there = ", ".join(f"{name} ({kind})" for name, (kind, _) in sorted(features.items())) or "none"
        if request.image is not None:
            if features.get(request.image, ("",))[0] != "bytes":
                raise InputError(
                    f"--image is {request.image!r} but must be a feature of bytes of {path} ({there}): choose one.",
                    field="--image",
                )
            self.image = request.image
        elif not images:
            raise InputError(f"{path} has no feature of encoded images; its features are {there}: give other files.")
        else:
            usual = [name for name in _IMAGES if name in images]
            if len(images) > 1 and not usual:
                raise InputError(
                    f"{path} has several features of images ({', '.join(images)}): choose one, such as --image "
                    f"{images[0]}."
                )
            self.image = (usual or images)[0]
        usable = [name for name, (kind, _) in features.items() if kind in ("int64", "bytes") and name not in images]
        if request.label not in (None, NO_LABEL) and request.label not in usable:
            raise InputError(
                f"--label is {request.label!r} but must be a feature of {path} ({', '.join(sorted(usable))}): choose "
                "one of these, or none.",
                field="--label",
            )
        found = next((name for name in _LABELS if name in usable), None)
        self.label = None if request.label == NO_LABEL else request.label or found
        self._name = next((name for name in _NAMES if features.get(name, ("",))[0] == "bytes"), None)

    def _record(self, features: dict[str, tuple[str, memoryview]], file: File, row: int) -> None:
        kind, values = features.get(self.image, ("", memoryview(b"")))
        image = first_bytes(values) if kind == "bytes" else None
        self.rows["image_size"].append(0 if image is None else len(image))
        if self.label is not None:
            kind, values = features.get(self.label, ("", memoryview(b"")))
            label: int | str | None = first_int(values) if kind == "int64" else None
            if kind == "bytes" and (text := first_bytes(values)) is not None:
                label = bytes(text).decode("utf-8", "replace")
            self.labels.append(label)
        name = features.get(self._name or "", ("", None))[1]
        text = None if name is None else first_bytes(name)
        key = "" if text is None else bytes(text).decode("utf-8", "replace").lstrip("/")
        self.keys.append(key or f"{file.name}/{row:06d}")

    def source(self, look: Look, request: Request) -> FormSource:
        """The images of these files."""
        columns = {name: np.frombuffer(column, np.int64) for name, column in self.rows.items()}
        labels = unlabelled(len(self.keys))
        if self.label is not None:
            names = class_names(look, self.label)
            labels = number_labels(self.labels, where=look.path, names=names)
            labels = _without_background(labels, self.label)
        named = all(may_be_deep_name(key) or "." in key for key in self.keys) and self._name is not None
        return FormSource(
            look.path,
            keys=self.keys,
            labels=labels,
            nbytes=columns["image_size"],
            reader=RecordReader(self.maps, [file.path for file in self.files], columns, self.image),
            deep=[n for n, key in enumerate(self.keys) if may_be_deep_name(key)] if named else None,
        )


def _without_background(labels: Labels, name: str) -> Labels:
    """ImageNet's scripts number classes from 1 and keep 0 for a background class that no image has."""
    if name != "image/class/label" or not labels.classes or bool((labels.values == 0).any()):
        return labels
    values = np.where(labels.values > 0, labels.values - 1, -1)
    return Labels(values=values, classes=labels.classes[: len(labels.classes) - 1])


def class_names(look: Look, label: str) -> list[str] | None:
    """Class names that TensorFlow Datasets keeps beside the records (``label.labels.txt``)."""
    found = [path for name, path in look.texts.items() if name.rpartition("/")[2] == f"{label}.labels.txt"]
    if not found and not look.is_folder:
        beside = (look.path if look.path.is_dir() else look.path.parent) / f"{label}.labels.txt"
        found = [beside] if beside.is_file() else []
    if not found:
        return None
    try:
        text = text_of(found[0], read_regular(found[0], most=LARGEST_JSON))
    except ValueError as error:
        raise InputError(f"{found[0]} is no list of class names ({error}): write it again.") from None
    names = [line for line in text.split("\n") if line]
    return names if len(set(names)) == len(names) else None


def _mapped(file: File) -> memoryview:
    if file.head.startswith(b"\x1f\x8b"):
        raise InputError(f"{file.path} is compressed, which cannot be read in place: unpack it (gunzip).")
    with file.path.open("rb") as opened:
        if file.size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is truncated or damaged ({why}): download it again.")


class RecordReader:
    """Reads images out of mapped files and checks each record's checksum."""

    def __init__(
        self, maps: Sequence[memoryview], paths: Sequence[Path], columns: dict[str, np.ndarray], image: str
    ) -> None:
        self._maps, self._paths, self._columns, self._image = maps, paths, columns, image

    def read(self, row: int) -> Any:
        """See `Reader`."""
        number, offset, size = (int(self._columns[name][row]) for name in ("file", "offset", "size"))
        data = self._maps[number][offset : offset + size]
        if masked_crc(data) != _TAIL.unpack_from(self._maps[number], offset + size)[0]:
            raise unreadable("the checksum of its record is wrong")
        values = example(data).get(self._image)
        image = None if values is None else first_bytes(values[1])
        if image is None:
            raise unreadable("its record has no image")
        return np.frombuffer(image, np.uint8)

    def close(self) -> None:
        """See `Reader`; the files stay mapped as long as an image of them is in use."""
