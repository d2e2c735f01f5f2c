"""Reads a list of images: plain text, or CSV with a header."""

from __future__ import annotations

import csv
import errno
import logging
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.files import decode_text
from pipelines.names import shortened, utf8
from pipelines.runtime import InputError
from pipelines.storage.file_index import FileIndex, begins_as_image, is_image_name, remedy_for
from pipelines.storage.source import KeyTable, file_name

_PATH = ("path", "filepath", "file_path", "image_path", "img_path", "filename", "file_name", "file", "image", "img")
_LABEL = ("label", "class", "target", "class_name", "classname", "label_name", "category", "labels")
_TABLES = {".csv": ",", ".tsv": "\t"}
_DELIMITERS = (",", ";", "\t", "|")
_NONE = "-1"  # the label of an image without one
_NUMBER = re.compile("0|[1-9][0-9]{0,99}")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
_IMAGE_AND_MORE = re.compile(r"\S\.\w+[\"']?\s+(.*\S)")
_HEAD = 4096  # bytes that show whether a file is text, which may be a large archive
_THREADS = 8  # concurrent stat calls: hides the latency of network file systems
_LIMIT = 1000  # characters of a path in a message
_log = logging.getLogger("mvssl.data")


class _Line(NamedTuple):
    """An image of the list: its path and label as written, and where."""

    name: str
    label: str | None
    number: int


def read_list(path: Path, *, progress: Callable[[int], None] | None = None) -> FileIndex:
    """Index the images named in a text file, in its order.

    A line is ``PATH``, ``PATH<tab>LABEL`` or ``PATH LABEL``; or the file is a CSV table whose header names a column
    ``path``, ``file``, ``filename`` or ``image`` and maybe one ``label``, ``class`` or ``target``. Relative paths start
    at the list's own folder. Labels are names, -1 for none; see `number_labels`. Either all lines have one or none.
    Empty lines are skipped, as are those that begin with ``#`` where no such file exists. Text is UTF-8, UTF-16 or,
    where files of such names exist, Latin-1.

    Args:
        path: the list.
        progress: called with the number of images looked up so far.

    Raises:
        InputError: the file is no list, or a line cannot be used; names the line.
    """
    list_mtime = path.stat().st_mtime_ns
    lines = list(_lines(path))
    labels, classes = _labels(path, lines)
    root = Path(os.path.abspath(path.parent))
    names = [file_name(line.name) for line in lines]
    absolute = [os.path.join(root, name) for name in names]
    _warn_of_repeats(path, absolute, labels)
    mtimes = {folder: _mtime(folder) for folder in {os.path.dirname(name) for name in absolute}}
    sizes: list[int] = []  # taken after the folders' times: a change in between makes the index stale
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, size in enumerate(pool.map(_file_size, absolute, chunksize=256), start=1):
            sizes.append(size)
            if progress is not None and (number % 10_000 == 0 or number == len(absolute)):
                progress(number)
    missing = [position for position, size in enumerate(sizes) if size < 0]
    read_as: Counter[str] = Counter()
    for position in missing:
        for how, name in _other_readings(names[position]):
            folder = os.path.dirname(os.path.join(root, name))
            mtimes.setdefault(folder, _mtime(folder))
            size = _file_size(os.path.join(root, name))
            if size >= 0:
                names[position], sizes[position] = name, size
                read_as[how] += 1
                break
        else:
            raise _missing(path, root, lines[position], names[position], len(missing) - read_as.total(), len(names))
    for how, count in read_as.items():
        _log.warning("%s: %d of %d paths name files only when read %s", path, count, len(names), how)
    watched = [*sorted((folder, mtime) for folder, mtime in mtimes.items() if mtime >= 0)]
    watched.append((os.path.abspath(path), list_mtime))
    return FileIndex(
        root=root,
        keys=KeyTable.of(names),
        nbytes=np.array(sizes, dtype=np.int64),
        labels=labels,
        classes=classes,
        watched=KeyTable.of(name for name, _ in watched),
        watched_mtime=np.array([mtime for _, mtime in watched], dtype=np.int64),
    )


def _lines(path: Path) -> list[_Line]:
    """The images of the list, as written."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
        with suppress(UnicodeDecodeError):
            if _CONTROL.search(decode_text(head).removesuffix("\x1a")):  # the end of a file of DOS
                raise _no_list(path, head)
        content = (head + file.read()).removesuffix(b"\x1a")
    try:
        text = decode_text(content)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} begins as {error.encoding.upper()} text but is damaged at byte {error.start} (two encodings in "
            "one file?): save the list as UTF-8."
        ) from error
    rows = text.split("\n")
    first = next((row for row in rows if row.strip()), "")
    delimiter = _header_delimiter(first)
    if delimiter is not None and _file_size(os.path.join(path.parent, first.strip())) < 0:
        return list(_table(path, rows, delimiter))
    ending = path.suffix.lower()
    if ending in _TABLES and "\t" not in first and any(mark in first for mark in _DELIMITERS):
        raise InputError(
            f"{path}, line {rows.index(first) + 1} is '{first}' but must be a header: write path,label there "
            f"(or one of {', '.join(_PATH[1:])} and, if there are labels, one of {', '.join(_LABEL[1:])})."
        )
    stripped = ((number, row.strip()) for number, row in enumerate(rows, start=1))
    wanted = ((number, row) for number, row in stripped if row and not (row[0] == "#" and _is_comment(path, row)))
    return [_plain(path, row, number) for number, row in wanted]


def _is_comment(path: Path, row: str) -> bool:
    """Whether a line that begins with # names no image."""
    name = _plain(path, row, 0).name
    return not is_image_name(name) and not os.path.lexists(path.parent / file_name(name))


def _no_list(path: Path, head: bytes) -> InputError:
    """The error for a file that is no text."""
    remedy = remedy_for(path.suffix.lower()) or "check the path"
    first = head.partition(b"\0")[0].decode("utf-8", "replace")
    if begins_as_image(head):
        remedy = "it is one image: give the folder that it is in, or a list of its path"
    elif is_image_name(first) and not _CONTROL.search(first):
        remedy = "write each path on a line of its own, as find -print does in place of -print0"
    return InputError(
        f"{path} is neither a folder of images, nor converted data, nor a text list of image files (one path per "
        f"line): {remedy}."
    )


def _header_delimiter(first: str) -> str | None:
    """The delimiter of the table that begins with this line; None if it is no header."""
    for delimiter in _DELIMITERS:
        if delimiter in first and any(name in _PATH for name in _cells(first, delimiter)):
            return delimiter
    return "," if _cells(first, ",")[0] in _PATH else None


def _cells(header: str, delimiter: str) -> list[str]:
    try:
        row = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:  # a cell of more than 131,072 characters
        row = []
    return [cell.strip().strip("\"'").casefold().replace(" ", "_") for cell in row] or [""]


def _table(path: Path, rows: Sequence[str], delimiter: str) -> Iterator[_Line]:
    """The images of a CSV table with a header."""
    reader = csv.reader((row + "\n" for row in rows), delimiter=delimiter, skipinitialspace=True)
    header: list[str] | None = None
    column, labels = 0, None
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = _cells(delimiter.join(f'"{cell}"' for cell in row), delimiter)
                column = min(
                    (header.index(name) for name in _PATH if name in header), key=lambda n: _PATH.index(header[n])
                )
                labels = next((header.index(name) for name in _LABEL if name in header), None)
                if labels is None and len(header) > 1:
                    _log.warning("%s: no column is named %s: the images have no labels", path, ", ".join(_LABEL))
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num} has {len(row)} columns but the header has {len(header)}: put "
                    f"cells that contain {delimiter!r} in quotation marks."
                )
            label = None if labels is None else row[labels].strip()
            yield _Line(row[column].strip(), label or None, reader.line_num)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is no line of a CSV table ({error}): correct it.") from error


def _plain(path: Path, line: str, number: int) -> _Line:
    """The image of a line of plain text."""
    if "\t" in line:
        name, _, label = (part.strip() for part in line.rpartition("\t"))
        if not is_image_name(label):
            return _Line(name, label, number)
        if is_image_name(name) and _file_size(os.path.join(path.parent, line)) < 0:
            raise InputError(
                f"{path}, line {number} names two images, '{name}' and '{label}': write one image "
                "per line, and its class after a tab."
            )
        return _Line(line, None, number)  # a tab in the name
    name, _, label = line.rpartition(" ")
    # Paths may contain spaces: the last word is a label only if what precedes it is an image path by itself.
    if is_image_name(os.path.basename(name.strip().strip("\"'"))) and not is_image_name(label.strip("\"'")):
        return _Line(name.strip(), label, number)
    return _Line(line, None, number)


def _other_readings(name: str) -> Iterator[tuple[str, str]]:
    """Other names that a path may stand for, and how it is then read."""
    found = [("", name)]
    if name[:1] == name[-1:] and name[:1] in "\"'":
        found.append(("without quotation marks", name[1:-1]))
    if utf8(name) != name:
        found.append(("as Latin-1", _latin(name)))
    if "\\" in name:
        found.extend([("with / for \\", other.replace("\\", "/")) for _, other in found])
    for form in ("NFC", "NFD"):
        found.extend([(f"in Unicode's form {form}", unicodedata.normalize(form, other)) for _, other in found[:4]])
    for how, other in found[1:]:
        if other not in ("", name):
            yield how, file_name(other)


def _missing(path: Path, root: Path, line: _Line, name: str, count: int, of: int) -> InputError:
    tried = " (read as UTF-8 and as Latin-1)" if utf8(name) != name else ""
    remedy = f"write paths relative to {root} or absolute ones"
    is_folder = os.path.isdir(os.path.join(root, name))
    if is_folder:
        remedy = "write the paths of its images, or give a list of folders as data in Python"
    elif utf8(name) != name:
        remedy += ", and save the list as UTF-8"
    elif name[:1] in "[{":
        remedy += "; JSON is no list"
    elif _words_after(name):
        remedy += f"; a class of several words, such as '{_words_after(name)}', goes behind a tab"
    elif any(mark in name for mark in _DELIMITERS) or name.casefold() in _PATH + _LABEL:
        remedy += "; a CSV table needs the header path,label"
    return InputError(
        f"{path}, line {line.number}: the file '{shortened(line.name, _LIMIT)}'{tried} "
        f"{'is a folder' if is_folder else 'does not exist'} ({count} of {of} are missing): {remedy}."
    )


def _words_after(line: str) -> str:
    """The words after the name of an image; "" if there are none."""
    found = _IMAGE_AND_MORE.search(line)
    is_name = found is not None and is_image_name(line[: found.start(1)].rstrip().rstrip("\"'"))
    return shortened(found[1], 100) if found is not None and is_name and not is_image_name(found[1]) else ""


def _warn_of_repeats(path: Path, absolute: Sequence[str], labels: npt.NDArray[np.int64]) -> None:
    """Say how many lines name an image again, and with another label."""
    first: dict[str, int] = {}
    again = [(n, first.setdefault(os.path.normpath(name), n)) for n, name in enumerate(absolute)]
    again = [(n, before) for n, before in again if n != before]
    other = [n for n, before in again if labels[n] != labels[before]]
    if again:
        differ = f", {len(other):,} with another label, such as {absolute[other[0]]}" if other else ""
        _log.warning("%s: %d of %d lines name an image again%s", path, len(again), len(absolute), differ)


def _labels(path: Path, lines: Sequence[_Line]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels, int64 [N], and class names."""
    given = [line.label for line in lines if line.label is not None]
    if not given:
        return np.full(len(lines), -1, dtype=np.int64), ()
    if len(given) < len(lines):
        without = next(line for line in lines if line.label is None)
        words = _words_after(without.name)
        tab = f"; a class of several words, such as '{words}', goes behind a tab" if words else ""
        raise InputError(
            f"{path}, line {without.number} has no label while other lines have one: give every line a label "
            f"({_NONE} for none) or none at all{tab}."
        )
    return number_labels([_latin(label) if utf8(label) != label else label for label in given])


def number_labels(names: Sequence[str]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels, int64 [N], and class names: different texts are different classes, "-1" is none.

    Classes are sorted as numbers if all are whole numbers, else as text. Labels 0 to K - 1 therefore are the numbers of
    their classes; 1, 18 and 90 are three classes.
    """
    distinct = set(names) - {_NONE}
    classes = sorted(distinct, key=int) if all(map(_NUMBER.fullmatch, distinct)) else sorted(distinct)
    label_of = {_NONE: -1, **{name: label for label, name in enumerate(classes)}}
    return np.array([label_of[name] for name in names], dtype=np.int64), tuple(classes)


def _latin(text: str) -> str:
    """Text whose bytes are read as Windows' Latin-1."""
    raw = text.encode("utf-8", "surrogateescape")
    try:
        return raw.decode("cp1252")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _file_size(path: str) -> int:
    """Size in bytes; -1 if there is no file of that name, which a folder, pipe or device is not."""
    try:
        status = os.stat(path)
        return status.st_size if stat.S_ISREG(status.st_mode) else -1
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a zero byte in the name
        return -1
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return -1
        raise


def _mtime(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except (OSError, ValueError):
        return -1  # its files are reported as missing
