"""Find out what SRC is, and open it: one job for each split.

ImageNet's own archives as sources, read in place: nothing is unpacked.

Names for tar members: safe to unpack, unique, and read by WebDataset as one sample each.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import numpy.typing as npt

from pipelines.conversion.class_files import read_classes, read_val_labels
from pipelines.runtime import InputError
from pipelines.storage import Source, align_labels, beton, folder, shards, split_paths
from pipelines.storage.file_index import IMAGE_EXTENSIONS, is_image_name
from pipelines.storage.source import KeyTable, fingerprint

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


def member_keys(names: Iterable[str]) -> list[str]:
    """Turn source keys (relative paths) into tar stems, in order.

    The image extension goes, dots in the last part become underscores (WebDataset cuts a name at its first dot), a
    leading ``/`` and ``..`` go, and a stem already taken gets ``_1``, ``_2``, ... behind it.
    """
    taken: set[str] = set()
    keys = []
    for name in names:
        stem = _stem(name)
        key, count = stem, 0
        while key in taken:
            count += 1
            key = f"{stem}_{count}"
        taken.add(key)
        keys.append(key)
    return keys


def _stem(name: str) -> str:
    *folders, last = [part for part in name.split("/") if part not in ("", ".", "..")] or ["image"]
    lower = last.lower()
    for extension in IMAGE_EXTENSIONS:
        if lower.endswith(extension):
            last = last[: -len(extension)]
            break
    return "/".join([*folders, last.replace(".", "_") or "image"])


TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One data set to convert.

    Attributes:
        name: folder below DST, "train" or "val"; "" for DST itself.
        source: where the images come from.
        labels: int64 [len(source)], numbered by `classes`.
        classes: class names in sorted order.
    """

    name: str
    source: Source
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]


def find_jobs(
    src: Path, *, val_labels: Path | None, classes_file: Path | None, progress: Progress | None = None
) -> list[Job]:
    """Open what SRC is: a folder, a list, converted data, train/ and val/ in a folder, or ImageNet's archives.

    Where there are two splits, val is numbered by the classes of train; ``--classes`` numbers both.

    Raises:
        InputError: SRC is missing, empty or damaged, or its classes do not fit.
        OSError: it cannot be read.
    """
    if not src.exists():
        raise InputError(f"SRC {src} does not exist: give a folder of images, a list of files or ImageNet's archives.")
    listed = None if classes_file is None else read_classes(classes_file)
    classes = None if listed is None else tuple(sorted(listed))
    paths = _split(src)
    if val_labels is not None and not any(path.suffix == ".tar" for _, path in paths):
        raise InputError(f"--val-labels is for ImageNet's val archive but SRC {src} is not one: leave it out.")
    jobs: list[Job] = []
    for name, path in paths:
        source = _open_input(path, val_labels=val_labels, listed=listed, progress=progress)
        if classes is None and name == "val" and jobs[0].classes and source.classes:
            classes = jobs[0].classes
        if classes is None or not source.classes:
            jobs.append(Job(name=name, source=source, labels=source.labels, classes=source.classes))
        else:
            jobs.append(Job(name=name, source=source, labels=align_labels(source, classes), classes=classes))
    return jobs


def _split(src: Path) -> list[tuple[str, Path]]:
    archives = [("train", src / TRAIN_ARCHIVE), ("val", src / VAL_ARCHIVE)]
    if src.is_dir() and all(path.is_file() for _, path in archives):
        return archives
    if src.is_dir() and not (beton.claims(src) or shards.claims(src)):
        for _, path in archives:
            if path.is_file():
                return [("", path)]
        train, val = split_paths(src)
        if val is not None:
            return [("train", train), ("val", val)]
        if train != src:
            return [("train", train)]
    return [("", src)]


def _open_input(
    path: Path, *, val_labels: Path | None, listed: tuple[str, ...] | None, progress: Progress | None
) -> Source:
    if path.suffix != ".tar":
        if beton.claims(path):
            return beton.open(path)
        if shards.claims(path):
            return shards.open(path)
        # The whole data is read anyway: index it afresh, so that sizes are those of today.
        return folder.open(path, progress=progress, use_cache=False)
    if is_train_archive(path):
        return open_train_archive(path, progress=progress)
    if val_labels is None:
        raise InputError(
            f"{path} does not say which class its images have: give --val-labels FILE with one wnid a line in the "
            "order of the file names, or lines of NAME WNID."
        )
    members = list_val_archive(path, progress=progress)
    names = read_val_labels(val_labels, [member[0] for member in members], listed)
    classes = tuple(sorted(set(names)))
    return ArchiveSource(path, list(zip(names, members, strict=True)), classes)
