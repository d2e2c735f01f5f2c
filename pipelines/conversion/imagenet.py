"""Reads ImageNet's archives in place, and the files that label the images of its val archive."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import numpy.typing as npt

from pipelines.files import strict_text
from pipelines.runtime import InputError
from pipelines.storage.file_index import is_image_name
from pipelines.storage.source import KeyTable, fingerprint

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
_REPORT_EVERY = 10_000  # images
_MAX_PADDING = 1 << 20  # bytes of zeros after the last member: the largest record in use (GNU tar's default: 10 KiB)
_WNID = re.compile(r"n\d{8}")
_HEADER = "ImageId"  # first word of LOC_val_solution.csv

Member = tuple[str, int, int]  # file name without extension, offset in the archive, bytes


class ArchiveSource:
    """Images in an uncompressed tar file, read by offset. Implements `Source`."""

    def __init__(self, path: Path, members: Sequence[tuple[str, Member]], classes: tuple[str, ...]) -> None:
        """`members` are (class name, member); keys are ``<class>/<name>``, in sorted order."""
        rows = sorted((f"{name}/{member[0]}", name, member[1], member[2]) for name, member in members)
        label_of = {name: label for label, name in enumerate(classes)}
        self.location = path
        self.classes = classes
        self.labels: npt.NDArray[np.int64] = np.array([label_of[row[1]] for row in rows], dtype=np.int64)
        self.nbytes: npt.NDArray[np.int64] = np.array([row[3] for row in rows], dtype=np.int64)
        self._offset = np.array([row[2] for row in rows], dtype=np.int64)
        self._keys = KeyTable.of(row[0] for row in rows)
        self.fingerprint = fingerprint(self._keys, labels=self.labels, nbytes=self.nbytes, classes=classes)
        self._file = os.open(path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Encoded image: uint8 [bytes]."""
        data = os.pread(self._file, int(self.nbytes[index]), int(self._offset[index]))
        return np.frombuffer(data, dtype=np.uint8)

    def key(self, index: int) -> str:
        """``<class>/<file name without extension>``."""
        return self._keys[index]

    def close(self) -> None:
        """Close the archive."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def open_archive(
    path: Path,
    *,
    val_labels: Path | None,
    classes: tuple[str, ...] | None,
    progress: Callable[[int], None] | None = None,
) -> ArchiveSource:
    """Open a train archive (a tar of one tar per class) or a val archive (a flat tar, with its label file).

    Args:
        path: the archive.
        val_labels: class of each image of a val archive.
        classes: class names in the order in which integers in `val_labels` count.
        progress: called with the number of images found so far.
    """
    if _is_train_archive(path):
        return _open_train_archive(path, progress)
    if val_labels is None:
        raise InputError(
            f"{path} does not say which class its images have: give --val-labels FILE with one wnid per line in the "
            "order of the file names, or lines of NAME WNID."
        )
    members = _val_members(path, progress)
    names = read_val_labels(val_labels, [member[0] for member in members], classes)
    return ArchiveSource(path, list(zip(names, members, strict=True)), tuple(sorted(set(names))))


def _is_train_archive(path: Path) -> bool:
    """Whether the first file in the archive is an archive itself."""
    with path.open("rb") as file, _open_tar(file, path) as archive:
        for info in archive:
            if info.isfile():
                return info.name.endswith(".tar")
    raise InputError(f"{path} holds no files: download it again.")


def _open_train_archive(path: Path, progress: Callable[[int], None] | None) -> ArchiveSource:
    """Index a tar of one tar per class (``n01440764.tar``, ...); classes are their sorted names."""
    members: list[tuple[str, Member]] = []
    classes = set()
    with path.open("rb") as file, _open_tar(file, path) as archive:
        for info in _members(archive, file, path):
            inner = archive.extractfile(info) if info.name.endswith(".tar") else None
            if inner is None:
                continue
            name, start = PurePosixPath(info.name).stem, info.offset_data
            with _open_tar(inner, path, start=start) as class_archive:
                images = filter(_is_image, _members(class_archive, inner, path, start=start))
                members.extend((name, _member(image, start=start)) for image in images)
            classes.add(name)
            if progress is not None:
                progress(len(members))
    if not members:
        raise _damaged(path, "there are no images in it")
    return ArchiveSource(path, members, tuple(sorted(classes)))


def _val_members(path: Path, progress: Callable[[int], None] | None) -> list[Member]:
    """Images of a flat tar, sorted by file name."""
    members: list[Member] = []
    with path.open("rb") as file, _open_tar(file, path) as archive:
        for info in filter(_is_image, _members(archive, file, path)):
            members.append(_member(info))
            if progress is not None and len(members) % _REPORT_EVERY == 0:
                progress(len(members))
    if not members:
        raise _damaged(path, "there are no images in it")
    return sorted(members)


def _open_tar(file: IO[bytes], path: Path, *, start: int = 0) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError as error:
        raise _damaged(path, f"at byte {start} there is no uncompressed tar file ({error})") from None


def _members(archive: tarfile.TarFile, file: IO[bytes], path: Path, *, start: int = 0) -> list[tarfile.TarInfo]:
    """All members of `archive`, read from `file`, which begins at byte `start` of `path`.

    `tarfile` takes an unreadable header for the end of the archive and silently drops everything after it. So the
    members must be followed by the zeros that every tar program writes.
    """
    try:
        members = archive.getmembers()
    except tarfile.TarError as error:
        raise _damaged(path, str(error)) from None
    end = 0
    if members:
        last = members[-1]
        end = last.offset_data + (-(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if last.isreg() else 0)
    file.seek(end)
    rest = file.read(_MAX_PADDING + 1)
    # After the first block of zeros POSIX allows any bytes up to the end of the record.
    if len(rest) < tarfile.BLOCKSIZE or any(rest[: tarfile.BLOCKSIZE]) or any(rest[tarfile.RECORDSIZE :]):
        raise _damaged(path, f"at byte {start + end} there is neither a file nor the end marker")
    if len(rest) > _MAX_PADDING:
        raise _damaged(path, f"from byte {start + end} on there are only zeros")
    return members


def _is_image(info: tarfile.TarInfo) -> bool:
    return info.isfile() and is_image_name(PurePosixPath(info.name).name)


def _member(info: tarfile.TarInfo, *, start: int = 0) -> Member:
    return PurePosixPath(info.name).stem, start + info.offset_data, info.size


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(
        f"the archive {path} is truncated or damaged: {problem}; download it again and compare its checksum."
    )


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, one per line, in the file's order (of ``n01440764 tench, ...`` the wnid)."""
    names = []
    for line in _lines(path, "--classes"):
        first = line.split()[0].rstrip(",")
        names.append(first if _WNID.fullmatch(first) else line)
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise InputError(f"--classes {path} has the class {repeated!r} twice: give one line per class.")
    return tuple(names)


def read_val_labels(path: Path, names: Sequence[str], classes: tuple[str, ...] | None) -> list[str]:
    """Class name of each image of the val archive.

    Lines are wnids in the order of the file names, ``NAME WNID`` pairs in any order (also ImageNet's
    LOC_val_solution.csv), or either with integers for wnids, which need `classes`.

    Args:
        path: the file.
        names: file names without extension, sorted.
        classes: class names in the order in which integers count, from ``--classes``.
    """
    lines = [re.split(r"[\s,]+", line)[:2] for line in _lines(path, "--val-labels")]
    if lines[0][0] == _HEADER:
        lines = lines[1:]
    lengths = {len(line) for line in lines}
    if len(lengths) > 1:
        raise InputError(
            f"--val-labels {path} has lines with one word and lines with two: give either WNID or NAME WNID on each."
        )
    if len(lines) != len(names):
        raise InputError(
            f"--val-labels {path} has {len(lines)} lines but the archive has {len(names)} images: give one line per "
            "image."
        )
    if lengths == {1}:
        found = [line[0] for line in lines]
    else:
        by_name = {PurePosixPath(line[0]).name.partition(".")[0]: line[1] for line in lines}
        missing = next((name for name in names if name not in by_name), None)
        if missing is not None:
            raise InputError(f"--val-labels {path} has no line for the image {missing}: give one line per image.")
        found = [by_name[name] for name in names]
    if all(label.isdecimal() for label in found):
        return _resolve(path, [int(label) for label in found], classes)
    return found


def _resolve(path: Path, numbers: list[int], classes: tuple[str, ...] | None) -> list[str]:
    """Class names of integers, which count from 0 or from 1."""
    if classes is None:
        raise InputError(
            f"--val-labels {path} holds integers, which do not say whose numbering they follow (ImageNet's own ground "
            "truth does not count in wnid order): give the classes in that numbering, one wnid per line, with "
            "--classes FILE."
        )
    first, last = min(numbers), max(numbers)
    start = 0 if first == 0 else 1
    if last - start >= len(classes):
        raise InputError(
            f"--val-labels {path} holds the number {last} but --classes has {len(classes)} lines: give the file that "
            "belongs to these numbers."
        )
    if first != 0 and last < len(classes):
        raise InputError(
            f"--val-labels {path} holds numbers from {first} to {last} for {len(classes)} classes, which may count "
            "from 0 or from 1: write wnids instead of numbers."
        )
    return [classes[number - start] for number in numbers]


def _lines(path: Path, option: str) -> list[str]:
    """Lines that are not empty."""
    try:
        lines = [line.strip() for line in strict_text(path.read_bytes()).split("\n") if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{option} {path} does not exist: check the path.") from None
    except InputError as error:
        raise InputError(f"{option} {path} is not a text file: {error}") from None
    if not lines:
        raise InputError(f"{option} {path} is empty: give one line per entry.")
    return lines
