"""Index of plain image files: scans a folder, or reads a text list of paths."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.runtime import InputError
from pipelines.storage.source import KeyTable

_BUILT_IN = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".jp2", ".j2k", ".avif")
_WITH_PLUGIN = (".heic", ".heif")
IMAGE_EXTENSIONS = _BUILT_IN + (_WITH_PLUGIN if importlib.util.find_spec("pillow_heif") else ())
"""Extensions of image files, in any case. HEIC needs the package pillow_heif."""
_SYSTEM_FOLDERS = ("lost+found", "@eaDir")  # unreadable for users; thumbnails made by NAS devices
_THREADS = 8  # concurrent stat or scandir calls: hides the latency of network file systems
_MAX_CLASSES = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class FileIndex:
    """Every image of a folder or list.

    Attributes:
        root: the folder that relative keys start from.
        keys: path of each image, relative to `root` (absolute if a list says so); sorted, or in the list's order.
        nbytes: int64 [len], file sizes; 0 if stat failed (reading the file then names the error).
        labels: int64 [len], -1 for none.
        classes: class names by label, () if unlabelled.
        watched: absolute paths whose change makes this index stale: every folder scanned, and the list.
        watched_mtime: int64 [len(watched)], their modification times in nanoseconds, taken before they were read.
        ignored: number of other files by extension; {} for a list and for a cached index.
    """

    root: Path
    keys: KeyTable
    nbytes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    watched: KeyTable
    watched_mtime: npt.NDArray[np.int64]
    ignored: dict[str, int] = field(default_factory=dict)


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image: a known extension in any case, and not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def is_data_folder(entry: os.DirEntry[str]) -> bool:
    """Whether `entry` is a folder (or a link to one) that may hold images: neither hidden nor ``lost+found``."""
    if entry.name.startswith(".") or entry.name in _SYSTEM_FOLDERS:
        return False
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def scan_folder(root: Path, *, progress: Callable[[int], None] | None = None) -> FileIndex:
    """Index every image below `root`, sorted by relative path.

    Links are followed; hidden names and folders of the file system are ignored. Labels are the first folder level: the
    sorted names of the folders that hold images. Images directly in `root` have no label (-1).

    Args:
        root: the folder.
        progress: called with the number of images found so far.
    """
    found: list[tuple[str, int]] = []
    watched: list[tuple[str, int]] = []
    ignored: Counter[str] = Counter()
    level = [_Folder(os.path.abspath(root), "", frozenset())]
    with ThreadPoolExecutor(_THREADS) as pool:
        while level:
            below: list[_Folder] = []
            for listing in pool.map(_list_folder, level):
                watched.append((listing.folder.path, listing.mtime))
                found.extend(listing.images)
                ignored.update(listing.ignored)
                below.extend(listing.folders)
                if progress is not None and listing.images:
                    progress(len(found))
            level = below
    found.sort()
    firsts = [key.partition("/")[0] if "/" in key else None for key, _ in found]
    classes = tuple(sorted({first for first in firsts if first is not None}))
    label_of: dict[str | None, int] = {None: -1, **{name: label for label, name in enumerate(classes)}}
    return FileIndex(
        root=Path(os.path.abspath(root)),
        keys=KeyTable.of(key for key, _ in found),
        nbytes=np.array([size for _, size in found], dtype=np.int64),
        labels=np.array([label_of[first] for first in firsts], dtype=np.int64),
        classes=classes,
        watched=KeyTable.of(path for path, _ in watched),
        watched_mtime=np.array([mtime for _, mtime in watched], dtype=np.int64),
        ignored=dict(ignored.most_common()),
    )


@dataclass(frozen=True)
class _Folder:
    path: str  # absolute
    prefix: str  # relative to the root, "" or ending in "/"
    ancestors: frozenset[tuple[int, int]]  # (device, inode) of the folders above, to detect links in a cycle


@dataclass
class _Listing:
    folder: _Folder
    mtime: int = 0
    images: list[tuple[str, int]] = field(default_factory=list)
    folders: list[_Folder] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def _list_folder(folder: _Folder) -> _Listing:
    status = os.stat(folder.path)  # before scandir: a change while we read makes the index stale
    identity = (status.st_dev, status.st_ino)
    listing = _Listing(folder, status.st_mtime_ns)
    if identity in folder.ancestors:
        return listing
    ancestors = folder.ancestors | {identity}
    with os.scandir(folder.path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_data_folder(entry):
                listing.folders.append(_Folder(entry.path, f"{folder.prefix}{entry.name}/", ancestors))
            elif is_image_name(entry.name):
                listing.images.append((folder.prefix + entry.name, _entry_size(entry)))
            else:
                listing.ignored.append(os.path.splitext(entry.name)[1].lower())
    return listing


def _entry_size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a broken link stays in the index, so that reading it names it
        return 0


def read_list(path: Path, *, progress: Callable[[int], None] | None = None) -> FileIndex:
    """Index the images named in a text file, in its order.

    A line is ``PATH``, ``PATH<tab>LABEL`` or ``PATH LABEL``; relative paths start at the list's own folder. A label is
    an integer (-1 for none; the class names are then the numbers) or a class name (numbered in sorted order). Either
    all lines have a label or none. Empty lines are skipped.

    Args:
        path: the list.
        progress: called with the number of images looked up so far.
    """
    list_mtime = path.stat().st_mtime_ns
    names, label_texts, lines = _parse(path)
    labels, classes = _labels(path, label_texts, lines)
    root = Path(os.path.abspath(path.parent))
    absolute = [os.path.join(root, name) for name in names]
    folders = sorted({os.path.dirname(name) for name in absolute})
    watched = [(folder, _mtime(folder)) for folder in folders]  # before the files, as in `_list_folder`
    watched.append((os.path.abspath(path), list_mtime))
    sizes: list[int] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, size in enumerate(pool.map(_file_size, absolute, chunksize=256), start=1):
            sizes.append(size)
            if progress is not None and (number % 10_000 == 0 or number == len(absolute)):
                progress(number)
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
    """Names, labels and line numbers of the lines that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is neither a folder of images, nor converted data, nor a text list of image files (one path per "
            "line): check the path."
        ) from None
    names: list[str] = []
    labels: list[str | None] = []
    lines: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
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
    # Paths may contain spaces: the last word is a label only if what precedes it is an image path by itself.
    if is_image_name(os.path.basename(name.strip())) and not is_image_name(label):
        return name.strip(), label
    return line, None


def _labels(
    path: Path, texts: Sequence[str | None], lines: Sequence[int]
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels, int64 [N], and class names."""
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


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def _mtime(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return -1  # its files are reported as missing
