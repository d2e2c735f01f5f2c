"""Opens SRC as one job per split, and tells an unreadable image from a source that is gone."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.conversion.imagenet import TRAIN_ARCHIVE, VAL_ARCHIVE, open_archive, read_classes
from pipelines.runtime import InputError
from pipelines.storage import Source, align_labels, beton, folder, shards, split_paths

_log = logging.getLogger("mvssl.data")

# Errors of the machine or the mount, which every other read would meet too.
_FATAL = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOSPC}
_MAX_CONSECUTIVE = 100  # unreadable images: no data set is like that, but an unmounted or failed disk is


@dataclass(frozen=True, kw_only=True)
class Job:
    """One data set to convert.

    Attributes:
        name: folder below DST, "train" or "val"; "" for DST itself.
        source: the images.
        labels: int64 [len(source)], numbered by `classes`.
        classes: class names, sorted; those that only val has come last.
    """

    name: str
    source: Source
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]


def find_jobs(
    src: Path, *, val_labels: Path | None, classes_file: Path | None, progress: Callable[[int], None] | None = None
) -> list[Job]:
    """Open SRC: a folder, a list, converted data, a folder with train/ and val/, or ImageNet's archives.

    The val split is numbered by the classes of the train split; ``--classes`` numbers both.
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
        if path.suffix == ".tar":
            source: Source = open_archive(path, val_labels=val_labels, classes=listed, progress=progress)
        elif beton.can_open(path):
            source = beton.open_path(path)
        elif shards.can_open(path):
            source = shards.open_path(path)
        else:  # without the cache, whose sizes may be out of date
            source = folder.open_path(path, progress=progress, use_cache=False)
        if classes is None and name == "val" and jobs[0].classes and source.classes:
            others = tuple(other for other in source.classes if other not in jobs[0].classes)
            classes = jobs[0].classes + others
            if others:
                _log.warning(
                    "%s has classes that train lacks (%s): they are numbered after those of train; kNN leaves them out",
                    path,
                    ", ".join(others[:3]) + (", ..." if len(others) > 3 else ""),
                )
        if classes is None or not source.classes:
            jobs.append(Job(name=name, source=source, labels=source.labels, classes=source.classes))
        else:
            jobs.append(Job(name=name, source=source, labels=align_labels(source, classes), classes=classes))
    return jobs


def _split(src: Path) -> list[tuple[str, Path]]:
    archives = [("train", src / TRAIN_ARCHIVE), ("val", src / VAL_ARCHIVE)]
    if src.is_dir() and all(path.is_file() for _, path in archives):
        return archives
    if src.is_dir() and not (beton.can_open(src) or shards.can_open(src)):
        for _, path in archives:
            if path.is_file():
                return [("", path)]
        train, val = split_paths(src)
        if val is not None:
            return [("train", train), ("val", val)]
        if train != src:
            return [("train", train)]
    return [("", src)]


def read(source: Source, index: int) -> npt.NDArray[np.uint8] | str:
    """Encoded image, uint8 [bytes], or the reason if only this image cannot be read.

    Raises:
        OSError: the error is not of this image alone.
        InputError: the source is damaged.
    """
    try:
        return source.read(index)
    except FileNotFoundError:
        if not source.location.exists():
            raise
        return "the file does not exist (a broken link?)"
    except OSError as error:
        if error.errno in _FATAL:
            raise
        return f"the file cannot be read: {error.strerror or error}"


class SourceGoneError(InputError):
    """No image can be read any more."""


class ReadErrors:
    """Counts consecutive images that cannot be read.

    Attributes:
        shards: numbers of the shards that lack these images; they are not finished if the source is gone.
    """

    def __init__(self, source: Source) -> None:
        self._location = source.location
        self._count = 0
        self.shards: set[int] = set()

    def add(self, reason: str, *, shard: int) -> None:
        """Count the next image; `reason` is "" if it was read.

        Raises:
            SourceGoneError: too many in a row.
        """
        if not reason:
            self._count = 0
            self.shards.clear()
            return
        self._count += 1
        self.shards.add(shard)
        if self._count >= _MAX_CONSECUTIVE:
            raise SourceGoneError(
                f"the source {self._location} is gone: the last {self._count} images could not be read, because "
                f"{reason}; check that its disk is mounted and readable, and run the same command again (finished "
                "shards are kept)."
            )
