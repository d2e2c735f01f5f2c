"""Several sources as one, and sources of lists of paths."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.names import Url, located
from pipelines.runtime import InputError, shown
from pipelines.storage import direct, open_source, split_paths
from pipelines.storage.file_index import FileIndex, holds_image, is_image_name
from pipelines.storage.folder import FolderSource
from pipelines.storage.image_facts import ImageFacts, facts_of
from pipelines.storage.items import named_labels
from pipelines.storage.source import KeyTable, ReadsAhead, ReadsBatches, Source
from pipelines.storage.text_list import number_labels


class JoinedSource:
    """The images of several sources, one after another; classes of the same name are one. Implements `Source`."""

    def __init__(self, parts: Sequence[Source]) -> None:
        """`parts` are one or more.

        Raises:
            InputError: their images of more than 8 bits have different ranges of values.
        """
        self._parts = tuple(parts)
        counts = [len(part) for part in parts]
        self._starts = np.cumsum([0, *counts])
        self.labels, self.classes = _joined_labels(parts)
        self.nbytes = np.concatenate([part.nbytes for part in parts])
        self.facts = _joined_facts(parts, self._starts)
        names = [part.location.name for part in parts]
        distinct = len(set(names)) == len(names)
        self._prefixes = names if distinct else [f"{n}/{name}" for n, name in enumerate(names)]
        self.location = Path(" and ".join(map(str, dict.fromkeys(part.location for part in parts))))
        digest = hashlib.sha256("\0".join((*(part.fingerprint for part in parts), *self.classes)).encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """See `Source`."""
        part, inside = self._place(index)
        return self._part(part).read(inside)

    def read_batch(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """See `ReadsBatches`."""
        found: dict[int, npt.NDArray[np.uint8] | None] = {}
        for number, wanted in self._by_part(indices).items():
            part = self._part(number)
            start = int(self._starts[number])
            read = part.read_batch(wanted) if isinstance(part, ReadsBatches) else [None] * len(wanted)
            found.update((start + index, data) for index, data in zip(wanted, read, strict=True))
        return [found[index] for index in indices]

    def will_need(self, indices: Sequence[int]) -> None:
        """See `ReadsAhead`."""
        for number, wanted in self._by_part(indices).items():
            part = self._part(number)
            if isinstance(part, ReadsAhead):
                part.will_need(wanted)

    def key(self, index: int) -> str:
        """The key in its source, after the name of that source."""
        number, inside = self._place(index)
        return f"{self._prefixes[number]}/{self._parts[number].key(inside)}"

    def close(self) -> None:
        """See `Source`."""
        for part in self._parts:
            part.close()

    def _place(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def _part(self, number: int) -> Source:
        """A part, with the limits that were stated for the whole."""
        part = self._parts[number]
        facts_of(part).limits = self.facts.limits
        return part

    def _by_part(self, indices: Sequence[int]) -> dict[int, list[int]]:
        wanted: dict[int, list[int]] = {}
        for index in indices:
            number, inside = self._place(index)
            wanted.setdefault(number, []).append(inside)
        return wanted


def joined(parts: Sequence[Source]) -> Source:
    """The sources as one; a single one itself."""
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def _joined_labels(parts: Sequence[Source]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels, int64 [len], and class names."""
    if all(part.classes == parts[0].classes for part in parts):
        return np.concatenate([part.labels for part in parts]), parts[0].classes
    names = list(dict.fromkeys(name for part in parts for name in part.classes))
    numbers, classes = number_labels(names)
    label_of = dict(zip(names, numbers.tolist(), strict=True))
    tables = [np.array([*(label_of[name] for name in part.classes), -1], dtype=np.int64) for part in parts]
    return np.concatenate([table[part.labels] for table, part in zip(tables, parts, strict=True)]), classes


def _joined_facts(parts: Sequence[Source], starts: npt.NDArray[np.int64]) -> ImageFacts:
    facts = [facts_of(part) for part in parts]
    ranges = {one.value_range for one in facts} - {None}
    if len(ranges) > 1:
        raise InputError(
            f"data has images of more than 8 bits with the ranges of values {' and '.join(map(str, ranges))}: convert "
            "all of them with the same --value-range."
        )
    sums = [one.checksums for one in facts]
    known = [one for one in sums if one is not None]
    whole = ImageFacts.of(
        int(starts[-1]),
        checksums=np.concatenate(known) if len(known) == len(sums) else None,
        value_range=next(iter(ranges), None),
        exact_sizes=all(one.exact_sizes for one in facts),
    )
    for one, start in zip(facts, starts.tolist(), strict=False):
        whole.examined[start : start + len(one.examined)] = one.examined
        whole.damage.update((start + index, damage) for index, damage in one.damage.items())
        whole.digests.update((start + index, digest) for index, digest in one.digests.items())
        whole.notes += one.notes
    return whole


@dataclass(frozen=True, kw_only=True)
class GivenPath:
    """A path that the user gave, and the label of its images.

    Attributes:
        path: absolute.
        label: None for none, or that of a data set with labels of its own.
        where: how messages call it, such as data[3].
    """

    path: str
    label: int | str | None
    where: str

    @property
    def is_image(self) -> bool:
        """Whether it is an image file, and no folder, list or converted data."""
        if isinstance(located(self.path), Url):
            return False
        return not os.path.isdir(self.path) and (is_image_name(os.path.basename(self.path)) or holds_image(self.path))


def open_paths(given: Sequence[GivenPath], *, progress: Callable[[int], None] | None = None) -> Source:
    """The images at some paths in the given order, of which folders, lists and converted data hold many.

    Of a folder with train/ and val/ the former is taken. A label given with a path is that of all its images.

    Raises:
        InputError: a path does not exist or holds no images.
    """
    _check_existing(given)
    parts: list[Source] = []
    for are_images, some in groupby(given, key=lambda one: one.is_image):
        if are_images:
            parts.append(_files(list(some)))
            continue
        for one in some:
            source = open_source(split_paths(one.path)[0], progress=progress)
            if one.label is not None:
                source = _Labelled(source, one.label)
            parts.append(source)
    return joined(parts)


def _check_existing(given: Sequence[GivenPath]) -> None:
    missing = [one for one in given if not _is_there(one.path)]
    if missing:
        raise InputError(
            f"{missing[0].where} is {shown(missing[0].path)}, which does not exist ({len(missing):,} of {len(given):,} "
            "do not): give paths of image files, folders or converted data, absolute or from the working directory.",
            field="data",
        )


def _is_there(path: str) -> bool:
    """Whether it exists, is a pattern or split of what is read in place, or is a URL, whose opening finds out."""
    return os.path.exists(path) or isinstance(located(path), Url) or direct.can_open(Path(path))


def _files(given: Sequence[GivenPath]) -> FolderSource:
    """Image files as a source."""
    labels, classes = named_labels([one.label for one in given])
    paths = [one.path for one in given]
    return files_source(paths, labels=labels, classes=classes)


def files_source(
    paths: Sequence[str], *, labels: npt.NDArray[np.int64], classes: tuple[str, ...], root: str | None = None
) -> FolderSource:
    """Image files, by absolute paths in the given order, as a source; keys are relative to their common folder."""
    root = root or os.path.commonpath([os.path.dirname(path) for path in paths])
    nothing = KeyTable.of(())
    index = FileIndex(
        root=Path(root),
        keys=KeyTable.of(os.path.relpath(path, root) for path in paths),
        nbytes=np.array([_size(path) for path in paths], dtype=np.int64),
        labels=labels,
        classes=classes,
        watched=nothing,
        watched_mtime=np.zeros(0, dtype=np.int64),
    )
    return FolderSource(index, location=Path(root))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # reading it names the error
        return 0


class _Labelled:
    """A source whose images all have one label, given with its path."""

    def __init__(self, source: Source, label: int | str) -> None:
        self._source = source
        self.labels, self.classes = named_labels([label] * len(source))
        self.nbytes, self.location, self.facts = source.nbytes, source.location, facts_of(source)
        self.fingerprint = hashlib.sha256(f"{source.fingerprint}\0{label}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """See `Source`."""
        return self._source.read(index)

    def read_batch(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """See `ReadsBatches`."""
        source = self._source
        return source.read_batch(indices) if isinstance(source, ReadsBatches) else [None] * len(indices)

    def will_need(self, indices: Sequence[int]) -> None:
        """See `ReadsAhead`."""
        if isinstance(self._source, ReadsAhead):
            self._source.will_need(indices)

    def key(self, index: int) -> str:
        """See `Source`."""
        return self._source.key(index)

    def close(self) -> None:
        """See `Source`."""
        self._source.close()
