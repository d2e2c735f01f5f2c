"""Read the text files that say which class an image of the val archive has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipelines.runtime import InputError

_WNID = re.compile(r"n\d{8}")
_NAMES = ("ImageId",)  # the head line of LOC_val_solution.csv


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, one a line, in the file's order (in ``n01440764 tench, ...`` the wnid counts).

    Raises:
        InputError: no file, empty, or a class twice.
    """
    names = []
    for line in _lines(path, "--classes"):
        first = line.split()[0].rstrip(",")
        names.append(first if _WNID.fullmatch(first) else line)
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise InputError(f"--classes {path} has the class {repeated!r} twice: give one line for each class.")
    return tuple(names)


def read_val_labels(path: Path, names: Sequence[str], classes: tuple[str, ...] | None) -> list[str]:
    """Class name of each image of the val archive.

    Lines are wnids in the order of the file names, ``NAME WNID`` pairs in any order (also ImageNet's
    LOC_val_solution.csv), or either with whole numbers in place of wnids, which need `classes`.

    Args:
        path: the file.
        names: file names without extension, sorted.
        classes: class names in the order that whole numbers count, from ``--classes``.

    Raises:
        InputError: another number of lines than images, an image without a line, or numbers that cannot be resolved.
    """
    lines = [re.split(r"[\s,]+", line)[:2] for line in _lines(path, "--val-labels")]
    if lines[0][0] in _NAMES:
        lines = lines[1:]
    lengths = {len(line) for line in lines}
    if len(lengths) > 1:
        raise InputError(
            f"--val-labels {path} has lines with one word and lines with two: give either WNID or NAME WNID on each."
        )
    if len(lines) != len(names):
        raise InputError(
            f"--val-labels {path} has {len(lines)} lines but the archive has {len(names)} images: give one line for "
            "each image."
        )
    if lengths == {1}:
        found = [line[0] for line in lines]
    else:
        by_name = {PurePosixPath(line[0]).name.partition(".")[0]: line[1] for line in lines}
        lacking = next((name for name in names if name not in by_name), None)
        if lacking is not None:
            raise InputError(f"--val-labels {path} has no line for the image {lacking}: give one line for each image.")
        found = [by_name[name] for name in names]
    if all(label.isdecimal() for label in found):
        return _resolve(path, [int(label) for label in found], classes)
    return found


def _resolve(path: Path, numbers: list[int], classes: tuple[str, ...] | None) -> list[str]:
    if classes is None:
        raise InputError(
            f"--val-labels {path} holds whole numbers, which do not say whose numbering they follow (ImageNet's own "
            "ground truth does not count in wnid order): give the classes in that numbering, one wnid a line, with "
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
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{option} {path} does not exist: check the path.") from None
    except UnicodeDecodeError:
        raise InputError(f"{option} {path} is not a text file: check the path.") from None
    if not lines:
        raise InputError(f"{option} {path} is empty: give one line for each entry.")
    return lines
