"""Index a text list of images: one path a line, with or without a label."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.storage.index import FileIndex, is_image_name
from pipelines.storage.keys import KeyTable

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
