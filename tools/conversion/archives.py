"""ImageNet's own archives as sources, read in place: nothing is unpacked."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.storage.index import is_image_name
from pipelines.storage.keys import KeyTable
from pipelines.storage.source import fingerprint

_REPORT_EVERY = 10_000
_END_BYTES = 1 << 20  # zeros behind the last member, at most: the largest record in use (GNU tar's default: 10 KiB)

Member = tuple[str, int, int]  # file name without extension, offset in the archive, bytes


class ArchiveSource:
    """Images inside an uncompressed tar file, read by offset. Meets the `Source` contract."""

    def __init__(self, path: Path, members: Sequence[tuple[str, Member]], classes: tuple[str, ...]) -> None:
        """`members` are (class name, member); keys become ``<class>/<name>``, in sorted order."""
        ordered = sorted((f"{name}/{member[0]}", name, member[1], member[2]) for name, member in members)
        label_of = {name: label for label, name in enumerate(classes)}
        self.location = path
        self.classes = classes
        self.labels: npt.NDArray[np.int64] = np.array([label_of[row[1]] for row in ordered], dtype=np.int64)
        self.nbytes: npt.NDArray[np.int64] = np.array([row[3] for row in ordered], dtype=np.int64)
        self._offset = np.array([row[2] for row in ordered], dtype=np.int64)
        self._keys = KeyTable.of(row[0] for row in ordered)
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


def is_train_archive(path: Path) -> bool:
    """Whether the archive's first file is an archive itself (one per class), as in ILSVRC2012_img_train.tar.

    Raises:
        InputError: not a tar file.
    """
    with path.open("rb") as file, _open(file, path) as archive:
        for info in archive:
            if info.isfile():
                return info.name.endswith(".tar")
    raise InputError(f"{path} holds no files: download it again.")


def open_train_archive(path: Path, *, progress: Callable[[int], None] | None = None) -> ArchiveSource:
    """Index a tar of one tar per class (``n01440764.tar``, ...); classes are their sorted names.

    Raises:
        InputError: the archive or one in it is truncated, damaged or without images.
    """
    members: list[tuple[str, Member]] = []
    classes = set()
    with path.open("rb") as file, _open(file, path) as archive:
        for info in _members(archive, file, path):
            inner = archive.extractfile(info) if info.name.endswith(".tar") else None
            if inner is None:
                continue
            name, start = PurePosixPath(info.name).stem, info.offset_data
            with _open(inner, path, start=start) as class_archive:
                images = filter(_is_image, _members(class_archive, inner, path, start=start))
                members.extend((name, _member(image, start=start)) for image in images)
            classes.add(name)
            if progress is not None:
                progress(len(members))
    if not members:
        raise _damaged(path, "there are no images in it")
    return ArchiveSource(path, members, tuple(sorted(classes)))


def list_val_archive(path: Path, *, progress: Callable[[int], None] | None = None) -> list[Member]:
    """Images of a flat tar (ILSVRC2012_img_val.tar), sorted by file name.

    Raises:
        InputError: the archive is truncated, damaged or without images.
    """
    members: list[Member] = []
    with path.open("rb") as file, _open(file, path) as archive:
        for info in _members(archive, file, path):
            if _is_image(info):
                members.append(_member(info))
                if progress is not None and len(members) % _REPORT_EVERY == 0:
                    progress(len(members))
    if not members:
        raise _damaged(path, "there are no images in it")
    return sorted(members)


def _open(file: IO[bytes], path: Path, *, start: int = 0) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError as error:
        raise _damaged(path, f"what begins at byte {start} is no uncompressed tar file ({error})") from None


def _members(archive: tarfile.TarFile, file: IO[bytes], path: Path, *, start: int = 0) -> list[tarfile.TarInfo]:
    """All members of `archive`, which `file` holds and which begins at byte `start` of `path`.

    `tarfile` takes a header that it cannot read for the end, so whatever comes behind it would be lost without a word:
    the end must be the zeros that every tar program writes.

    Raises:
        InputError: the members do not end in zeros.
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
    rest = file.read(_END_BYTES + 1)
    # Behind the first zero block POSIX allows anything up to the end of the record.
    if len(rest) < tarfile.BLOCKSIZE or any(rest[: tarfile.BLOCKSIZE]) or any(rest[tarfile.RECORDSIZE :]):
        raise _damaged(path, f"at byte {start + end} there is neither a file nor the mark of the end")
    if len(rest) > _END_BYTES:
        raise _damaged(path, f"from byte {start + end} on there are only zeros")
    return members


def _is_image(info: tarfile.TarInfo) -> bool:
    return info.isfile() and is_image_name(PurePosixPath(info.name).name)


def _member(info: tarfile.TarInfo, *, start: int = 0) -> Member:
    return PurePosixPath(info.name).stem, start + info.offset_data, info.size


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"the archive {path} is truncated or damaged: {what}; download it again and compare its checksum."
    )
