"""Zip archives with folders as classes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.runtime import InputError
from pipelines.storage.forms.base import (
    NO_LABEL,
    FormSource,
    Found,
    Labels,
    Ranges,
    Request,
    counted,
    number_labels,
    unlabelled,
)
from pipelines.storage.forms.blobs import FileBlob, damaged, text_of
from pipelines.storage.forms.look import File, Look, by_split
from pipelines.storage.forms.names import are_classes, arrange, check_name, class_names, is_image_of_archive
from pipelines.storage.forms.parquet import may_be_deep_name
from pipelines.storage.forms.zip_reader import (
    Entry,
    check_entry,
    data_start,
    overlapping,
    read_entry,
    read_whole,
    zip_entries,
)

FALLBACK = True  # data sets of known names come as zips too
MAGICS = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
_COLUMNS = ("zip", "offset", "stored", "size", "crc", "method")


def recognise(look: Look) -> bool:
    """Whether a file begins as a zip, or has its name."""
    return bool(files_of(look))


def files_of(look: Look) -> list[File]:
    """The files of this form."""
    return [file for file in look.files if file.head.startswith(MAGICS) or file.name.lower().endswith(".zip")]


def open_form(look: Look, request: Request) -> Found:
    """Index the zips; splits are those in their names, or else the first folders in them."""
    for option, value in (("--image", request.image), ("--label", request.label)):
        if value is not None and value != NO_LABEL:
            raise InputError(
                f"{option} is {value!r} but must be left out for {look.path}: the classes of a zip are its folders.",
                field=option,
            )
    files = files_of(look)
    splits: dict[str, FormSource] = {}
    for name, of_split in by_split(look, files).items():
        index = ZipIndex([file.path for file in of_split], request)
        arranged = arrange(index.names, look.path)
        if name and len(arranged) > 1:
            raise InputError(f"{look.path} has splits in the names of its zips and in these: give one zip.")
        for inner, pairs in arranged.items():
            below = [relative for _, relative in pairs]
            labels = unlabelled(len(below))
            if request.label != NO_LABEL:
                names = class_names(below)
                if not any(names):
                    names = index.annotations(inner, below)
                labels = number_labels(names, where=look.path)
            splits[name or inner] = index.source(look.path, [at for at, _ in pairs], below, labels)
    return Found(what=counted(len(files), "zip archive"), splits=splits)


class ZipIndex:
    """The images of several zips, sorted by name."""

    def __init__(self, paths: Sequence[Path], request: Request) -> None:
        """List the zips; raises InputError if one is damaged, encrypted, holds no images, or has names twice."""
        self.names: list[str] = []
        self.texts: dict[str, tuple[int, Entry]] = {}  # number of the zip, and place, of small files: lists and tables
        self._blobs = [FileBlob(path) for path in paths]
        rows = {name: array("q") for name in _COLUMNS}
        others: dict[str, int] = {}
        for number, (path, blob) in enumerate(zip(paths, self._blobs, strict=True)):
            offsets, stored, names = array("q"), array("q"), set()
            for entry in zip_entries(path, blob):
                name = check_name(path, entry.name)
                offsets.append(entry.offset)
                stored.append(entry.stored)
                place = (number, entry.offset, entry.stored, entry.size, entry.crc, entry.method)
                if not is_image_of_archive(name):
                    ending = name.rpartition(".")[2].lower()
                    others[ending] = others.get(ending, 0) + 1
                    if ending in ("txt", "csv"):
                        self.texts[name] = (number, entry)
                    continue
                check_entry(path, entry)
                if name in names:
                    raise InputError(f"{path} holds {name[:200]!r} twice: write it again with one file of each name.")
                names.add(name)
                self.names.append(name)
                for column, value in zip(rows.values(), place, strict=True):
                    column.append(value)
                if len(self.names) % 10_000 == 0:
                    request.report(len(self.names))
            if overlapping(offsets.tolist(), stored.tolist()):
                raise InputError(f"{path} is a zip bomb (files in it share bytes): get it from its publisher.")
        if not self.names:
            there = ", ".join(f"{count:,} .{ending}" for ending, count in others.items()) or "nothing"
            raise InputError(
                f"{paths[0]} holds no images (it holds {there[:200]}): give a zip of images, or unpack what is in it."
            )
        request.report(len(self.names))
        stems = [path.stem for path in paths]
        if are_classes(stems) and not any("/" in name for name in self.names):
            self.names = [f"{stems[at]}/{name}" for at, name in zip(rows["zip"], self.names, strict=True)]
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        self.names = [self.names[n] for n in order]
        self._rows = {name: np.frombuffer(column, np.int64)[order] for name, column in rows.items()}

    def text(self, name: str) -> bytes:
        """The content of a small file; InputError if it is damaged."""
        number, entry = self.texts[name]
        path = self._blobs[number].path
        try:
            return read_whole(path, self._blobs[number], entry)
        except OSError as error:
            raise damaged(path, f"{name[:200]}: {error.strerror or error}") from None

    def annotations(self, split: str, names: Sequence[str]) -> list[str | None]:
        """Classes in ``val_annotations.txt``, which Tiny ImageNet has in place of folders: lines of file and class."""
        table = next((name for name in self.texts if name.endswith(f"{split}_annotations.txt")), None)
        if not split or table is None:
            return [None] * len(names)
        rows = [line.split() for line in text_of(self._blobs[self.texts[table][0]].path, self.text(table)).split("\n")]
        found = {row[0]: row[1] for row in rows if len(row) > 1}
        return [found.get(name.rpartition("/")[2]) for name in names]

    def source(self, location: Path, indices: Sequence[int], names: Sequence[str], labels: Labels) -> FormSource:
        """Some of the images as a source, with other names."""
        rows = {name: column[np.asarray(indices, dtype=np.int64)] for name, column in self._rows.items()}
        return FormSource(
            location,
            keys=names,
            labels=labels,
            nbytes=rows["size"],
            reader=ZipReader(self._blobs, rows),
            deep=[n for n, name in enumerate(names) if may_be_deep_name(name)],
        )


class ZipReader:
    """Reads images by their place in one of several zips."""

    def __init__(self, blobs: Sequence[FileBlob], rows: dict[str, np.ndarray]) -> None:
        self._blobs = blobs
        self._rows = rows

    def read(self, row: int) -> bytes:
        """See `Reader`."""
        place = {name: int(column[row]) for name, column in self._rows.items()}
        return read_entry(self._blobs[place.pop("zip")], **place)

    def ranges(self) -> Ranges | None:
        """See `HasRanges`; None if an image is compressed, or has no header where the list of the zip says."""
        rows = self._rows
        if rows["method"].any() or not np.array_equal(rows["stored"], rows["size"]):
            return None
        blobs = zip(rows["zip"].tolist(), rows["offset"].tolist(), strict=True)
        starts = [data_start(self._blobs[number], offset) for number, offset in blobs]
        if -1 in starts:
            return None
        return Ranges(
            paths=tuple(blob.path for blob in self._blobs),
            file=rows["zip"],
            offset=np.array(starts, dtype=np.int64),
            size=rows["size"],
            checksums=rows["crc"].astype(np.uint32),
        )

    def close(self) -> None:
        """See `Reader`."""
        for blob in self._blobs:
            blob.close()
