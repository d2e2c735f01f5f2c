"""The index of a folder or list: what `scan` and `listing` make, `cache` keeps and `folder` reads from.

Index a text list of images: one path a line, with or without a label.

Keep the index of a folder or list between runs, and notice when it is stale.

The cache lies in the user's cache folder and not beside the data: data sets are often shared or read-only, and a file
beside the images would change the very folder that is watched.

An index is stale when the modification time of any folder in it (or of the list) has changed: that is every image
added, removed or renamed. A file overwritten in place is not noticed, and need not be: only its size is out of date.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.runtime import InputError, cache_folder
from pipelines.storage.source import KeyTable

_ALWAYS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".jp2", ".j2k", ".avif")
_WITH_PLUGIN = (".heic", ".heif")
IMAGE_EXTENSIONS = _ALWAYS + (_WITH_PLUGIN if importlib.util.find_spec("pillow_heif") else ())
"""Endings of files that are images, in any case. Those of HEIC need the package pillow_heif."""


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image: a known extension in any case, and not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


@dataclass(frozen=True, kw_only=True, eq=False)
class FileIndex:
    """Every image of a folder or list.

    Attributes:
        root: the folder that relative keys start from.
        keys: path of each image, relative to `root` (or absolute, where a list says so), sorted or in the list's order.
        nbytes: int64 [len], file sizes; 0 for files that could not be looked at (the decoder names them).
        labels: int64 [len], -1 where there is none.
        classes: class names by label, () if unlabelled.
        watched: absolute paths whose change makes this index stale (every folder seen, and the list).
        watched_mtime: int64 [len(watched)], their modification times in nanoseconds, taken before they were read.
        left_out: number of other files by ending, where the folder was just read; {} for an index from the cache.
    """

    root: Path
    keys: KeyTable
    nbytes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    watched: KeyTable
    watched_mtime: npt.NDArray[np.int64]
    left_out: dict[str, int] = field(default_factory=dict)


_THREADS = 8  # sizes asked for at once: hides the latency of network file systems
_MAX_CLASSES = 1_000_000


def index_list(path: Path, *, progress: Callable[[int], None] | None = None) -> FileIndex:
    """Index the images named in a text file, in its order.

    A line is ``PATH``, ``PATH<tab>LABEL`` or ``PATH LABEL``; relative paths start at the list's own folder; a label is
    a whole number (-1 for none; the class names are then the numbers) or a class name (numbered in sorted order). All
    lines have a label or none has. Empty lines are skipped.

    Args:
        path: the list.
        progress: called with the number of images looked at so far.

    Raises:
        InputError: not a text file, a label missing or out of range, or a file that does not exist.
        OSError: the list cannot be read.
    """
    list_mtime = path.stat().st_mtime_ns
    names, labels_text, lines = _parse(path)
    labels, classes = _labels(path, labels_text, lines)
    root = Path(os.path.abspath(path.parent))
    sizes: list[int] = []
    absolute = [os.path.join(root, name) for name in names]
    folders = sorted({os.path.dirname(name) for name in absolute})
    watched = [(folder, _mtime(folder)) for folder in folders]  # before the files: a change meanwhile makes it stale
    watched.append((os.path.abspath(path), list_mtime))
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, size in enumerate(pool.map(_size, absolute, chunksize=256), start=1):
            sizes.append(size)
            if progress is not None and number % 10_000 == 0:
                progress(number)
    if progress is not None:
        progress(len(sizes))
    missing = [position for position, size in enumerate(sizes) if size < 0]
    if missing:
        raise InputError(
            f"{path}, line {lines[missing[0]]}: the file {names[missing[0]]!r} does not exist ({len(missing)} of "
            f"{len(names)} are missing): write paths relative to {root} or absolute ones."
        )
    return FileIndex(
        root=root,
        keys=KeyTable.of(names),
        nbytes=np.array(sizes, dtype=np.int64),
        labels=labels,
        classes=classes,
        watched=KeyTable.of(name for name, _ in watched),
        watched_mtime=np.array([mtime for _, mtime in watched], dtype=np.int64),
    )


def _parse(path: Path) -> tuple[list[str], list[str | None], list[int]]:
    names: list[str] = []
    labels: list[str | None] = []
    lines: list[int] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is neither a folder of images, nor converted data, nor a text list of image files (one path a "
            "line): check the path."
        ) from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, label = _split_line(line.strip())
        names.append(name)
        labels.append(label)
        lines.append(number)
    return names, labels, lines


def _split_line(line: str) -> tuple[str, str | None]:
    if "\t" in line:
        name, _, label = line.rpartition("\t")
        return name.strip(), label.strip()
    name, _, label = line.rpartition(" ")
    # A path may hold spaces: the last word is a label only behind something that is a whole image path itself.
    if is_image_name(os.path.basename(name.strip())) and not is_image_name(label):
        return name.strip(), label
    return line, None


def _labels(
    path: Path, texts: Sequence[str | None], lines: Sequence[int]
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    given = [text for text in texts if text is not None]
    if not given:
        return np.full(len(texts), -1, dtype=np.int64), ()
    if len(given) < len(texts):
        raise InputError(
            f"{path}, line {lines[texts.index(None)]} has no label while other lines have one: give every line a label "
            "(-1 for none) or none at all."
        )
    try:
        numbers = np.array([int(text) for text in given], dtype=np.int64)
    except (ValueError, OverflowError):
        classes = tuple(sorted(set(given)))
        label_of = {name: label for label, name in enumerate(classes)}
        return np.array([label_of[text] for text in given], dtype=np.int64), classes
    wrong = np.flatnonzero((numbers < -1) | (numbers >= _MAX_CLASSES))
    if len(wrong):
        raise InputError(
            f"{path}, line {lines[wrong[0]]}: the label {numbers[wrong[0]]} is not between -1 (none) and "
            f"{_MAX_CLASSES - 1}: number the classes from 0."
        )
    return numbers, tuple(str(label) for label in range(int(np.max(numbers, initial=-1)) + 1))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def _mtime(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return -1  # its files are reported as missing


_VERSION = zlib.crc32(repr((2, IMAGE_EXTENSIONS)).encode())  # other endings, other files
_SETTLED_NS = 2_000_000_000  # coarsest modification times of common file systems (FAT, some NFS servers): 2 s


def cache_file(path: Path) -> Path:
    """The cache file for the folder or list at `path`."""
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]
    return cache_folder() / f"index-{name}.npz"


def load_index(path: Path) -> FileIndex | None:
    """The cached index of the folder or list at `path`, or None where there is none, or a stale or damaged one."""
    try:
        with np.load(cache_file(path), allow_pickle=False) as data:
            if int(data["version"]) != _VERSION:
                return None
            index = FileIndex(
                root=Path(KeyTable(blob=data["root"], ends=np.array([len(data["root"])]))[0]),
                keys=KeyTable(blob=data["key_blob"], ends=data["key_ends"]),
                nbytes=data["nbytes"],
                labels=data["labels"],
                classes=tuple(KeyTable(blob=data["class_blob"], ends=data["class_ends"])),
                watched=KeyTable(blob=data["watched_blob"], ends=data["watched_ends"]),
                watched_mtime=data["watched_mtime"],
            )
        fresh = all(
            os.stat(watched).st_mtime_ns == mtime
            for watched, mtime in zip(index.watched, index.watched_mtime.tolist(), strict=True)
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged: the caller indexes again
    return index if fresh else None


def save_index(path: Path, index: FileIndex) -> bool:
    """Cache `index`; says whether it did. A cache that cannot be written is no error: the next run indexes again.

    Data changed within the last two seconds is not cached: a change right after could leave the modification time as
    it is, and would never be noticed.
    """
    if time.time_ns() - int(np.max(index.watched_mtime, initial=0)) < _SETTLED_NS:
        return False
    classes = KeyTable.of(index.classes)
    target = cache_file(path)
    temporary = None
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(
                file,
                version=np.int64(_VERSION),
                root=KeyTable.of([str(index.root)]).blob,
                key_blob=index.keys.blob,
                key_ends=index.keys.ends,
                nbytes=index.nbytes,
                labels=index.labels,
                class_blob=classes.blob,
                class_ends=classes.ends,
                watched_blob=index.watched.blob,
                watched_ends=index.watched.ends,
                watched_mtime=index.watched_mtime,
            )
        temporary.replace(target)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return False
    return True
