"""Find out what SRC is, and open it: one job for each split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.storage import Source, align_labels, beton, folder, shards, split_paths
from tools.conversion.archives import ArchiveSource, is_train_archive, list_val_archive, open_train_archive
from tools.conversion.class_files import read_classes, read_val_labels

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
        source = _open(path, val_labels=val_labels, listed=listed, progress=progress)
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


def _open(path: Path, *, val_labels: Path | None, listed: tuple[str, ...] | None, progress: Progress | None) -> Source:
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
