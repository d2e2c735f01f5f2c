"""Tar archives: WebDataset's, whose members belong together by name, and any others with folders as classes."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import parse_json
from pipelines.runtime import InputError
from pipelines.storage.file_index import is_image_name
from pipelines.storage.forms.base import (
    LABEL_NAMES,
    NO_LABEL,
    FormSource,
    Found,
    Labels,
    Ranges,
    Request,
    counted,
    number_labels,
    unlabelled,
    unreadable,
)
from pipelines.storage.forms.blobs import Blob, FileBlob, PackedBlob, damaged, open_blob, packing, unpacked_head
from pipelines.storage.forms.look import File, Look, by_split
from pipelines.storage.forms.names import (
    are_captions,
    are_classes,
    arrange,
    check_name,
    class_names,
    is_image_of_archive,
)
from pipelines.storage.forms.parquet import may_be_deep_name
from pipelines.storage.forms.tar_reader import BLOCK, DamagedTarError, Member, is_tar_header, tar_members
from pipelines.storage.remote_objects import RemoteObject

FALLBACK = True  # data sets of known names come as tars too
_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SIDECARS = ("cls", "json", "txt")  # that hold labels, the surest first
_NAME_KEYS = ("class_name", "label_name", "classname", "synset", "wnid", "category_name")
_LARGEST_LABEL = 1 << 20  # bytes
_REPORT_EVERY = 10_000
_CHUNK = 1 << 20  # bytes


def recognise(look: Look) -> bool:
    """Whether a file begins as a tar, compressed or not, or has a tar's name."""
    return bool(files_of(look))


def files_of(look: Look) -> list[File]:
    """The files of this form."""
    return [file for file in look.files if is_tar(file) or file.name.lower().endswith(_ENDINGS)]


def is_tar(file: File) -> bool:
    """Whether a file begins as a tar, compressed or not."""
    return is_tar_header((unpacked_head(file) if packing(file) else file.head)[:BLOCK])


def open_form(look: Look, request: Request) -> Found:
    """Index every archive; splits are those in the archives' names, or else their first folders."""
    files = files_of(look)
    splits: dict[str, FormSource] = {}
    kinds: set[str] = set()
    for name, of_split in by_split(look, files).items():
        index = _Index(of_split, request)
        found = index.webdataset(look.path, request) if index.is_webdataset else index.folders(look.path, request)
        kinds.add(f"WebDataset ({counted(len(files), 'tar')})" if index.is_webdataset else counted(len(files), "tar"))
        if name and len(found) > 1:
            raise InputError(f"{look.path} has splits in the names of its archives and in these: give one archive.")
        splits.update({name or inner: source for inner, source in found.items()})
    return Found(what=" and ".join(sorted(kinds)), splits=splits)


@dataclass
class _Labels:
    """What the label members of one kind say, by sample."""

    values: dict[int, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # class name beside an integer


class _Index:
    """Members of several tars: sample (members of one name up to the first dot), component, place."""

    def __init__(self, files: Sequence[File], request: Request) -> None:
        self.files = files
        self.blobs: list[Blob] = [open_blob(file) for file in files]
        self.keys: list[str] = []  # of samples
        self.components: list[str] = []
        self._numbers: dict[str, int] = {}
        self.rows = {name: array("q") for name in ("sample", "component", "tar", "offset", "size", "sum")}
        self.labels: dict[str, _Labels] = {name: _Labels() for name in _SIDECARS}
        self._label = request.label
        for number, file in enumerate(files):
            self._add(number, file, request)
        if not any(map(_is_image_component, self.components)):
            there = ", ".join(f".{name}" for name in self.components[:6]) or "nothing"
            raise InputError(
                f"{files[0].path} holds no images (it holds {there}): give archives of images, or unpack what is in it."
            )
        self.is_webdataset = self._has_sidecars()

    def _add(self, number: int, file: File, request: Request) -> None:
        blob, path = self.blobs[number], file.path
        samples: dict[str, int] = {}
        count = 0
        try:
            members = tar_members(blob.read, end=None if isinstance(blob, PackedBlob) else file.size)
            for member in members:
                name = check_name(path, member.name)
                base = name.rpartition("/")[2]
                if base.startswith(".") or "__MACOSX/" in name:
                    continue
                if member.is_link:
                    if is_image_name(base):
                        where = f"{path}: {name[:200]!r}"
                        raise InputError(
                            f"{where} is a link and no file: write it again with tar -h --hard-dereference."
                        )
                    continue
                self._member(number, samples, name, member, blob, path)
                count += 1
                if count % _REPORT_EVERY == 0:
                    request.report(len(self.keys))
            if isinstance(blob, PackedBlob):
                self._drain(blob, member.offset + member.size if count else 0)
        except DamagedTarError as error:
            raise damaged(path, str(error)) from None
        if not count:
            raise InputError(f"{path} holds no files: download it again.")
        request.report(len(self.keys))

    @staticmethod
    def _drain(blob: PackedBlob, at: int) -> None:
        """Unpack to the end, where the checksum is."""
        while data := blob.read(1 << 20, at):
            at += len(data)

    def _member(self, number: int, samples: dict[str, int], name: str, member: Member, blob: Blob, path: Path) -> None:
        folder, slash, base = name.rpartition("/")
        stem, _, component = base.partition(".")
        key = folder + slash + stem
        sample = samples.setdefault(key, len(self.keys))
        if sample == len(self.keys):
            self.keys.append(key)
        kind = self._numbers.setdefault(component, len(self.components))
        if kind == len(self.components):
            self.components.append(component)
        sums = isinstance(path, RemoteObject) and is_image_name(base)  # what a network sends is compared with them
        row = (sample, kind, number, member.offset, member.size, _sum(blob, member) if sums else -1)
        for column, value in zip(self.rows.values(), row, strict=True):
            column.append(value)
        lower = component.lower()
        wanted = lower in _SIDECARS if self._label is None else lower in (self._label.lower(), "json")
        if wanted and self._label != NO_LABEL and not is_image_name(f"x.{lower}"):
            if member.size > _LARGEST_LABEL:
                if self._label == component:
                    raise InputError(f"{path}: the label {name[:200]!r} has {member.size:,} bytes: choose another.")
                return
            data = blob.read(member.size, member.offset)
            self._add_label(lower, sample, data, f"{path}: {name[:200]}")

    def _add_label(self, component: str, sample: int, data: bytes, where: str) -> None:
        labels = self.labels.setdefault(component, _Labels())
        try:
            text = data.decode("utf-8")
            if component != "json":
                labels.values[sample] = _value(text.strip())
                return
            content = parse_json(text)
        except ValueError as error:
            raise InputError(f"{where} is no label in UTF-8 ({error}): write it again, or use --label none.") from None
        if not isinstance(content, dict):
            labels.values[sample] = content if isinstance(content, (int, str)) else None
            return
        keys = LABEL_NAMES if self._label in (None, "json") else (self._label or "",)
        value = next((content[key] for key in keys if isinstance(content.get(key), (int, str))), None)
        name = next((content[key] for key in _NAME_KEYS if isinstance(content.get(key), str)), None)
        if value is None:
            value = name if self._label in (None, "json") else None
        elif name is not None and isinstance(value, int):
            labels.names[value] = name
        if value is not None:
            labels.values[sample] = value

    def _has_sidecars(self) -> bool:
        """Whether other members belong to images."""
        table = {name: np.frombuffer(column, np.int64) for name, column in self.rows.items()}
        image = np.array([_is_image_component(name) for name in self.components])[table["component"]]
        with_image = np.unique(table["sample"][image])
        others = np.array([name.lower() in _SIDECARS for name in self.components])[table["component"]]
        return bool(np.isin(table["sample"][others], with_image).any())

    def _images(self, chosen: str | None) -> dict[str, np.ndarray]:
        """Columns of the images, one for each sample with an image, in the order of the archives."""
        table = {name: np.frombuffer(column, np.int64) for name, column in self.rows.items()}
        pair = table["sample"] * len(self.components) + table["component"]
        unique, first, times = np.unique(pair, return_index=True, return_counts=True)
        if len(unique) < len(pair):
            row = first[np.argmax(times > 1)]
            name = f"{self.keys[table['sample'][row]]}.{self.components[table['component'][row]]}"
            raise InputError(
                f"{self.files[table['tar'][row]].path} has {name[:200]!r} twice: write it again with each name once."
            )
        if chosen is not None:
            if chosen not in self.components:
                images = ", ".join(filter(_is_image_component, self.components))
                raise InputError(
                    f"--image is {chosen!r} but must be an image ending in {self.files[0].path} ({images}): choose "
                    "one of these.",
                    field="--image",
                )
            mask = table["component"] == self.components.index(chosen)
        else:
            mask = np.array([_is_image_component(name) for name in self.components])[table["component"]]
        return {name: column[mask] for name, column in table.items()}

    def webdataset(self, location: Path, request: Request) -> dict[str, FormSource]:
        """One split: a sample is an image with its label members."""
        images = self._images(request.image)
        counts = np.bincount(images["sample"], minlength=len(self.keys))
        if len(counts) and counts.max() > 1:
            sample = int(np.argmax(counts > 1))
            of = [self.components[c] for c in images["component"][images["sample"] == sample]]
            raise InputError(
                f"{self.files[0].path} has several images for one sample ({self.keys[sample][:200]}: {', '.join(of)}): "
                f"choose one, such as --image {of[0]}."
            )
        names = [
            f"{self.keys[sample]}.{self.components[kind]}"
            for sample, kind in zip(images["sample"].tolist(), images["component"].tolist(), strict=True)
        ]
        return {"": self._source(location, images, names, self._numbered(images["sample"].tolist(), location))}

    def _numbered(self, samples: Sequence[int], location: Path) -> Labels:
        if self._label == NO_LABEL:
            return unlabelled(len(samples))
        order = [self._label.lower(), "json"] if self._label else list(_SIDECARS)
        for name in order:
            labels = self.labels.get(name)
            if labels is None or not labels.values:
                continue
            found = [labels.values.get(sample) for sample in samples]
            if name == "txt" and self._label is None and are_captions(found):
                continue
            highest = max((one for one in found if isinstance(one, int)), default=-1)
            names = labels.names
            complete = names and len(names) == highest + 1 and len(set(names.values())) == len(names)
            return number_labels(
                found, where=location, names=[names[n] for n in range(highest + 1)] if complete else None
            )
        if self._label is not None:
            raise InputError(
                f"--label is {self._label!r} but must be an ending of label files in {self.files[0].path} "
                f"({', '.join(self.components[:8])}) or a key of their JSON: choose one of these, or none.",
                field="--label",
            )
        return unlabelled(len(samples))

    def folders(self, location: Path, request: Request) -> dict[str, FormSource]:
        """Splits and classes by folders; sorted by name, where that costs nothing."""
        images = self._images(request.image)
        names = [
            f"{self.keys[sample]}.{self.components[kind]}"
            for sample, kind in zip(images["sample"].tolist(), images["component"].tolist(), strict=True)
        ]
        stems = [file.path.name.partition(".")[0] for file in self.files]
        if are_classes(stems) and not any("/" in name for name in names):
            names = [f"{stems[tar]}/{name}" for tar, name in zip(images["tar"].tolist(), names, strict=True)]
        shown = [n for n, name in enumerate(names) if is_image_of_archive(name)]
        if any(isinstance(blob, PackedBlob) for blob in self.blobs):
            order = shown
        else:
            order = sorted(shown, key=names.__getitem__)
        splits = {}
        for split, pairs in arrange([names[n] for n in order], location).items():
            pick = np.array([order[index] for index, _ in pairs], dtype=np.int64)
            below = [name for _, name in pairs]
            labels = unlabelled(len(pick))
            if request.label != NO_LABEL:
                labels = number_labels(class_names(below), where=location)
            chosen = {name: column[pick] for name, column in images.items()}
            splits[split] = self._source(location, chosen, below, labels)
        if request.label not in (None, NO_LABEL):
            raise InputError(
                f"--label is {request.label!r} but must be none or left out: the classes of {location} are folders.",
                field="--label",
            )
        return splits

    def _source(
        self, location: Path, images: dict[str, np.ndarray], names: Sequence[str], labels: Labels
    ) -> FormSource:
        return FormSource(
            location,
            keys=names,
            labels=labels,
            nbytes=images["size"],
            reader=TarReader(self.blobs, images),
            deep=[n for n, name in enumerate(names) if may_be_deep_name(name)],
        )


class TarReader:
    """Reads images by their place in one of several archives."""

    def __init__(self, blobs: Sequence[Blob], images: dict[str, np.ndarray]) -> None:
        self._blobs = blobs
        self._tar, self._offset, self._size = images["tar"], images["offset"], images["size"]
        self._sums = images["sum"].astype(np.uint32) if np.all(images["sum"] >= 0) else None

    def read(self, row: int) -> bytes:
        """See `Reader`."""
        size = int(self._size[row])
        data = self._blobs[int(self._tar[row])].read(size, int(self._offset[row]))
        if len(data) < size:
            raise unreadable("the archive ends before it")
        return data

    def ranges(self) -> Ranges | None:
        """See `HasRanges`; None for compressed archives."""
        paths = [blob.path for blob in self._blobs if isinstance(blob, FileBlob)]
        if len(paths) < len(self._blobs):
            return None
        return Ranges(paths=tuple(paths), file=self._tar, offset=self._offset, size=self._size, checksums=self._sums)

    def close(self) -> None:
        """See `Reader`."""
        for blob in self._blobs:
            blob.close()


def _sum(blob: Blob, member: Member) -> int:
    """CRC-32 of a file in an archive."""
    total = 0
    for at in range(0, member.size, _CHUNK):
        total = zlib.crc32(blob.read(min(_CHUNK, member.size - at), member.offset + at), total)
    return total


def _is_image_component(component: str) -> bool:
    return is_image_name(f"x.{component}")


def _value(text: str) -> int | str | None:
    """A label: a whole number, or a name."""
    if not text:
        return None
    try:
        return int(text) if len(text) < 20 and text.isascii() and "_" not in text else text
    except ValueError:
        return text
