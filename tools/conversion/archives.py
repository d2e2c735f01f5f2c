"""ImageNet's own archives as sources, read in place: nothing is unpacked."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.storage.index import is_image_name
from pipelines.storage.keys import KeyTable
from pipelines.storage.source import fingerprint

_REPORT_EVERY = 10_000

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
    with _open(path) as archive:
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
    with _open(path) as archive:
        for info in _files(archive, path):
            if not info.name.endswith(".tar"):
                continue
            name = PurePosixPath(info.name).stem
            inner = archive.extractfile(info)
            try:
                with tarfile.open(fileobj=inner, mode="r:") as class_archive:
                    members.extend((name, _moved(member, info.offset_data)) for member in _images(class_archive))
            except tarfile.TarError as error:
                raise _damaged(path, f"{info.name} in it cannot be read ({error})") from None
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
    with _open(path) as archive:
        for info in _files(archive, path):
            if _is_image(info):
                members.append(_member(info))
                if progress is not None and len(members) % _REPORT_EVERY == 0:
                    progress(len(members))
    if not members:
        raise _damaged(path, "there are no images in it")
    return sorted(members)


def _open(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, mode="r:")
    except tarfile.TarError as error:
        raise _damaged(path, f"it cannot be read as an uncompressed tar file ({error})") from None


def _files(archive: tarfile.TarFile, path: Path) -> Sequence[tarfile.TarInfo]:
    try:
        members = archive.getmembers()
    except tarfile.TarError as error:
        raise _damaged(path, str(error)) from None
    if not members:
        return members
    last = members[-1]
    end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    # A download that stopped just between two members looks whole but for the zero block at the end.
    if path.stat().st_size < end + tarfile.BLOCKSIZE:
        raise _damaged(path, f"it ends after {last.name} without the mark of its end")
    return members


def _images(archive: tarfile.TarFile) -> list[Member]:
    return [_member(info) for info in archive if _is_image(info)]


def _is_image(info: tarfile.TarInfo) -> bool:
    return info.isfile() and is_image_name(PurePosixPath(info.name).name)


def _member(info: tarfile.TarInfo) -> Member:
    return PurePosixPath(info.name).stem, info.offset_data, info.size


def _moved(member: Member, by: int) -> Member:
    return member[0], member[1] + by, member[2]


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"the archive {path} is truncated or damaged: {what}; download it again.")
