"""Reads ImageNet's archives in place, and the files that label the images of its val archive."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from pipelines.files import open_regular, read_regular, strict_text
from pipelines.runtime import InputError
from pipelines.storage.file_index import is_image_name
from pipelines.storage.forms import tar_reader
from pipelines.storage.source import KeyTable, fingerprint

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
_LOOKED_AT = 100  # members, to tell ImageNet's flat archive from other tars
_REPORT_EVERY = 10_000  # images
_LARGEST_LIST = 1 << 28  # bytes of a label file
_WNID = re.compile(r"n\d{8}")
_VAL_NAME = re.compile(r"^(\./)?ILSVRC2012_val_\d{8}\.JPEG$")
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
    with open_regular(path) as file:
        if _is_train_archive(path, file.fileno()):
            return _open_train_archive(path, file.fileno(), progress)
        if val_labels is None:
            _check_flat(path, file.fileno())
        members = _val_members(path, file.fileno(), progress) if val_labels is not None else []
    if val_labels is None:
        raise InputError(
            f"{path} does not say which class its images have: give --val-labels FILE with one wnid per line in the "
            "order of the file names, or lines of NAME WNID."
        )
    names = read_val_labels(val_labels, [member[0] for member in members], classes)
    return ArchiveSource(path, list(zip(names, members, strict=True)), tuple(sorted(set(names))))


def is_imagenet_archive(path: Path) -> bool:
    """Whether a tar holds one tar per class, or images named as ImageNet's val images are."""
    try:
        with open_regular(path) as file:
            members = tar_reader.tar_members(file.fileno())
            return any(one.name.endswith(".tar") or _VAL_NAME.search(one.name) for one in islice(members, 1))
    except (tar_reader.DamagedTarError, OSError):
        return False


def _is_train_archive(path: Path, descriptor: int) -> bool:
    """Whether the first file in the archive is an archive itself."""
    for member in _members(path, descriptor):
        return member.name.endswith(".tar")
    raise InputError(f"{path} holds no files: download it again.")


def _check_flat(path: Path, descriptor: int) -> None:
    """Refuse a tar that is not ImageNet's: with folders of classes, or WebDataset's files beside each image."""
    for member in islice(_members(path, descriptor), _LOOKED_AT):
        *folders, name = [part for part in PurePosixPath(member.name).parts if part != "."]
        if folders or not is_image_name(name):
            what = f"folders ({folders[0]}/...)" if folders else f"other files ({name[:100]})"
            raise InputError(
                f"{path} is a tar with {what} and none of ImageNet's archives, the only ones that are read as they "
                f"are: unpack it (mkdir images && tar -xf {path} -C images) and give the folder; its folders are the "
                "classes."
            )


def _open_train_archive(path: Path, descriptor: int, progress: Callable[[int], None] | None) -> ArchiveSource:
    """Index a tar of one tar per class (``n01440764.tar``, ...); classes are their sorted names."""
    members: list[tuple[str, Member]] = []
    classes = set()
    for archive in _members(path, descriptor):
        if not archive.name.endswith(".tar"):
            continue
        name, end = PurePosixPath(archive.name).stem, archive.offset + archive.size
        images = filter(_is_image, _members(path, descriptor, start=archive.offset, end=end))
        members.extend((name, _member(image)) for image in images)
        classes.add(name)
        if progress is not None:
            progress(len(members))
    if not members:
        raise _damaged(path, "there are no images in it")
    return ArchiveSource(path, members, tuple(sorted(classes)))


def _val_members(path: Path, descriptor: int, progress: Callable[[int], None] | None) -> list[Member]:
    """Images of a flat tar, sorted by file name."""
    members: list[Member] = []
    for image in filter(_is_image, _members(path, descriptor)):
        members.append(_member(image))
        if progress is not None and len(members) % _REPORT_EVERY == 0:
            progress(len(members))
    if not members:
        raise _damaged(path, "there are no images in it")
    return sorted(members)


def _members(path: Path, descriptor: int, *, start: int = 0, end: int | None = None) -> Iterator[tar_reader.Member]:
    """The files of an archive, or of the one from byte `start` to byte `end` in it.

    Raises:
        InputError: it is damaged, a name leads out of it, or an image or archive in it is a link.
    """
    try:
        for member in tar_reader.tar_members(descriptor, start=start, end=end):
            parts = PurePosixPath(member.name).parts
            if ".." in parts or "/" in parts[:1] or not parts:
                raise _damaged(path, f"the name of {member.name[:200]!r} leads out of it")
            if not member.is_link:
                yield member
            elif _is_image(member) or member.name.endswith(".tar"):
                raise _damaged(path, f"{member.name[:200]!r} is a link and no file")
    except tar_reader.DamagedTarError as error:
        raise _damaged(path, str(error)) from None


def _is_image(member: tar_reader.Member) -> bool:
    return is_image_name(PurePosixPath(member.name).name)


def _member(member: tar_reader.Member) -> Member:
    return PurePosixPath(member.name).stem, member.offset, member.size


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
        text = strict_text(read_regular(path, most=_LARGEST_LIST))
    except FileNotFoundError:
        raise InputError(f"{option} {path} does not exist: check the path.") from None
    except ValueError as error:
        raise InputError(f"{option} {path} is not a text file: {error}") from None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{option} {path} is empty: give one line per entry.")
    return lines
