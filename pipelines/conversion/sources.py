"""Opens SRC as one job per split, and tells an unreadable image from a source that is gone."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.conversion.imagenet import (
    TRAIN_ARCHIVE,
    VAL_ARCHIVE,
    ArchiveSource,
    is_imagenet_archive,
    open_archive,
    read_classes,
)
from pipelines.names import Url
from pipelines.runtime import InputError
from pipelines.storage import RemoteOptions, Source, align_labels, beton, folder, shards, split_paths
from pipelines.storage.forms import Found, Request, find_form, open_form
from pipelines.storage.forms.base import counted
from pipelines.storage.forms.look import Look, look_at
from pipelines.storage.remote import RemoteShards
from pipelines.storage.remote_open import converted_splits, open_form_at

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
        classes: class names, sorted or in the order of the data set's own numbers; those that only val has come last.
        what: what SRC is, for the user.
    """

    name: str
    source: Source
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    what: str = ""


def find_jobs(
    src: Path,
    *,
    val_labels: Path | None,
    classes_file: Path | None,
    request: Request | None = None,
    split: str | None = None,
    remote: RemoteOptions | None = None,
) -> list[Job]:
    """Open SRC: a folder, a list, converted data, a folder with train/ and val/, ImageNet's archives, or a form.

    The other splits are numbered by the classes of the train split; ``--classes`` numbers all.

    Args:
        src: a path, or a pattern with ``{0..9}``, ``{a,b}``, ``*`` or ``?``.
        val_labels: of ImageNet's val archive.
        classes_file: all classes.
        request: what to read of a form.
        split: the only split to convert; None for all.
        remote: how SRC at a URL is read.
    """
    request = request or Request()
    listed = None if classes_file is None else read_classes(classes_file)
    if isinstance(src, Url):
        found = _at_url(src, request, remote or RemoteOptions())
    else:
        found = _find(src, val_labels=val_labels, classes=listed, request=request)
    if split is not None:
        if split not in found.splits:
            named = ", ".join(filter(None, found.splits)) or "it has one without a name"
            raise InputError(
                f"--split is {split!r} but must be a split of {src} ({named}): choose one of these, or leave it out.",
                field="--split",
            )
        found = replace(found, splits={"": found.splits[split]})
    classes = None if listed is None else tuple(sorted(listed))
    jobs: list[Job] = []
    for name, source in found.splits.items():
        if classes is None and name and jobs and jobs[0].classes and source.classes:
            others = tuple(other for other in source.classes if other not in jobs[0].classes)
            classes = jobs[0].classes + others
            if others:
                _log.warning(
                    "%s: %s has classes that train lacks (%s): they are numbered after those of train; kNN leaves them "
                    "out",
                    source.location,
                    name,
                    ", ".join(others[:3]) + (", ..." if len(others) > 3 else ""),
                )
        labels = source.labels
        if classes is not None and source.classes:
            labels = align_labels(source, classes)
        own = source.classes if classes is None or not source.classes else classes
        jobs.append(Job(name=name, source=source, labels=labels, classes=own, what=found.what))
        if listed is None:
            classes = None
    return jobs


def describe(src: Path, jobs: Sequence[Job]) -> str:
    """What SRC is, for the user."""
    counts = ", ".join(f"{job.name} {counted(len(job.source), 'image')}".lstrip() for job in jobs)
    classes = max(len(job.classes) for job in jobs)
    return f"{src} is {jobs[0].what}: {counts}, {counted(classes, 'class', 'classes') if classes else 'no labels'}."


def _find(src: Path, *, val_labels: Path | None, classes: tuple[str, ...] | None, request: Request) -> Found:
    """What SRC is, by its content."""
    converted = src.is_dir() and (beton.can_open(src) or shards.can_open(src))
    look = None if converted or (src.is_dir() and _archives(src)) else look_at(src)
    if look is None and not src.exists():
        raise InputError(
            f"SRC {src} does not exist: give a folder of images, a list of files, an archive, Parquet or another form "
            "of the table in the guide, or a pattern of such files in quotes."
        )
    if look is not None and _is_for_imagenet(src, look, val_labels):
        look = None
    form = None if look is None else find_form(look)
    if form is not None and look is not None:
        if val_labels is not None:
            raise _no_val_archive(src)
        return _with_val(open_form(form, look, request))
    for option, value in (("--image", request.image), ("--label", request.label)):
        if value is not None:
            raise InputError(
                f"{option} is {value!r} but must be left out for {src}, which has no columns or keys: leave it out.",
                field=option,
            )
    paths = _split(src)
    if val_labels is not None and not any(path.suffix == ".tar" for _, path in paths):
        raise _no_val_archive(src)
    splits: dict[str, Source] = {}
    for name, path in paths:
        if path.suffix == ".tar":
            splits[name] = open_archive(path, val_labels=val_labels, classes=classes, progress=request.progress)
        elif beton.can_open(path):
            splits[name] = beton.open_path(path)
        elif shards.can_open(path):
            splits[name] = shards.open_path(path)
        else:  # without the cache, whose sizes may be out of date
            splits[name] = folder.open_path(path, progress=request.progress, use_cache=False)
    return Found(what=_what(splits, paths[0][1]), splits=splits)


def _at_url(url: Url, request: Request, remote: RemoteOptions) -> Found:
    """What a URL is: converted data, or files of a form."""
    names = converted_splits(url, remote)
    if names:
        folders = {name.rstrip("/"): url / name for name in names}
        return Found(what="converted data", splits={name: RemoteShards(at, remote) for name, at in folders.items()})
    opened = open_form_at(url, request, remote)
    return _with_val(opened)


def _no_val_archive(src: Path) -> InputError:
    return InputError(f"--val-labels is for ImageNet's val archive but SRC {src} is not one: leave it out.")


def _is_for_imagenet(src: Path, look: Look, val_labels: Path | None) -> bool:
    """Whether SRC is one of ImageNet's own archives, which hold tars or need a file of labels."""
    if src.suffix != ".tar" or len(look.files) != 1:
        return False
    return src.name in (TRAIN_ARCHIVE, VAL_ARCHIVE) or val_labels is not None or is_imagenet_archive(src)


def _archives(src: Path) -> list[Path]:
    return [src / name for name in (TRAIN_ARCHIVE, VAL_ARCHIVE) if (src / name).is_file()]


def _with_val(found: Found) -> Found:
    """Without a val split, a labelled test split is the one that a data set is measured on (CIFAR, MNIST)."""
    names = list(found.splits)
    usable = {"train", "test"} <= set(names) and "val" not in names
    if not usable or (found.splits["train"].classes and not found.splits["test"].classes):
        order = ("train", "val", "test")
        names.sort(key=lambda name: order.index(name) if name in order else len(order))
        return replace(found, splits={name: found.splits[name] for name in names})
    rest = {name: source for name, source in found.splits.items() if name not in ("train", "test")}
    splits = {"train": found.splits["train"], "val": found.splits["test"], **rest}
    return Found(what=f"{found.what}, whose test split is converted as val", splits=splits)


def _what(splits: Mapping[str, Source], path: Path) -> str:
    """What a source is, in words."""
    source = next(iter(splits.values()))
    if isinstance(source, ArchiveSource):
        return "ImageNet's archives" if len(splits) > 1 else "an archive of ImageNet"
    if isinstance(source, folder.FolderSource):
        return "a folder of images" if path.is_dir() else "a list of images"
    return "converted data"


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
