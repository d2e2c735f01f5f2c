"""Looks at what a path holds: the files, how each begins, and the splits that their names say."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.files import open_regular
from pipelines.runtime import InputError
from pipelines.storage.file_index import begins_as_image, is_image_name
from pipelines.storage.splits import split_role

HEAD = 1024  # bytes looked at: those of a tar's magic are at 257
_DEEPEST = 6  # levels of folders, as in a cache of the hub (snapshots/<hash>/data/train)
_MOST_FILES = 50_000  # a data set of more files is one of single images
NO_DATA = (".md", ".txt", ".json", ".jsonl", ".csv", ".html", ".yaml", ".yml", ".lock", ".crc", ".py", ".info")
_WILD = re.compile(r"[*?\[]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NUMBERED = re.compile(r"[-_.]?\d+[-_]of[-_]\d+|\.tfrecord|\.\w+$")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, kw_only=True)
class File:
    """A file that may hold images.

    Attributes:
        path: where it is.
        name: relative to the folder that was given, with ``/``.
        size: bytes.
        head: its first `HEAD` bytes.
    """

    path: Path
    name: str
    size: int
    head: bytes


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a path holds.

    Attributes:
        path: what was given (of a pattern: the folder above), for messages.
        files: files with data, sorted by name; () for a folder of images.
        texts: small files beside them (JSON, lists of classes) by name.
        is_folder: whether a folder was given.
    """

    path: Path
    files: tuple[File, ...]
    texts: dict[str, Path] = field(default_factory=dict)
    is_folder: bool = False

    def starting(self, *magics: bytes, at: int = 0) -> list[File]:
        """The files that have one of these bytes at an offset."""
        return [file for file in self.files if file.head[at:].startswith(magics)]


def look_at(path: Path) -> Look | None:
    """What is at `path`: a file, a folder, or a pattern with ``{0..9}``, ``{a,b}``, ``*`` or ``?``; None if nothing is.

    Raises:
        InputError: files that a pattern names do not exist.
        OSError: a file or folder cannot be read.
    """
    if path.is_dir():
        return _look_into(path)
    if path.exists():
        return Look(path=path, files=(_file(path, path.name),))
    text = str(path)
    if "{" not in text and not _WILD.search(text):
        return None
    paths = _expanded(text)
    if not paths:
        return None
    base = Path(os.path.commonpath([found.parent for found in paths]))
    files = [_file(found, found.relative_to(base).as_posix()) for found in paths if not found.is_dir()]
    files.extend(file for found in paths if found.is_dir() for file in _below(found, base))
    return Look(path=base, files=tuple(sorted(files, key=lambda file: file.name)), texts=_texts(base))


def _expanded(text: str) -> list[Path]:
    """The files that a pattern names, each once."""
    found: dict[Path, None] = {}
    missing = []
    for one in expand_braces(text):
        matches = sorted(glob.glob(one)) if _WILD.search(one) else [one] if os.path.exists(one) else []
        found.update((Path(match), None) for match in matches)
        if not matches:
            missing.append(one)
    if missing and found:
        raise InputError(
            f"{text} names {len(found) + len(missing)} files of which {len(missing)} do not exist, such as "
            f"{missing[0]}: give a pattern of files that are there, or copy those."
        )
    return list(found)


def expand_braces(text: str) -> Iterator[str]:
    """The texts that a pattern with ``{000..012}`` and ``{a,b}`` stands for, as a shell writes them."""
    start = text.find("{")
    end = text.find("}", start)
    if start < 0 or end < 0:
        yield text
        return
    inner, head, tail = text[start + 1 : end], text[:start], text[end + 1 :]
    numbers = _RANGE.fullmatch(inner)
    if numbers:
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        if int(last) - int(first) >= _MOST_FILES:
            raise InputError(f"{text} names more than {_MOST_FILES:,} files: give a smaller range in {{...}}.")
        pieces: Sequence[str] = [str(n).zfill(width) for n in range(int(first), int(last) + 1)]
    elif "," in inner:
        pieces = inner.split(",")
    else:
        pieces = [f"{{{inner}}}"]
        head, tail = head + pieces[0], tail
        for rest in expand_braces(tail):
            yield head + rest
        return
    for piece, rest in itertools.product(pieces, list(expand_braces(tail))):
        yield head + piece + rest


def _file(path: Path, name: str) -> File:
    with open_regular(path) as file:
        return File(path=path, name=name, size=os.fstat(file.fileno()).st_size, head=file.read(HEAD))


def _look_into(folder: Path) -> Look:
    files = []
    for file in _below(folder, folder):
        if is_image_name(os.path.basename(file.name)) or begins_as_image(file.head):
            return Look(path=folder, files=(), is_folder=True)
        files.append(file)
        if len(files) > _MOST_FILES:
            return Look(path=folder, files=(), is_folder=True)
    return Look(path=folder, files=tuple(files), texts=_texts(folder), is_folder=True)


def _below(folder: Path, base: Path, depth: int = 0) -> Iterator[File]:
    """Files with data below a folder, in sorted order, the nearest first; hidden ones are left out."""
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    names = {entry.name for entry in found}
    for entry in found:
        if entry.is_file() and not entry.name.lower().endswith(NO_DATA):
            path = Path(entry.path)
            if is_image_name(entry.name):  # nothing else of it is of use
                yield File(path=path, name=path.relative_to(base).as_posix(), size=0, head=b"")
            else:
                with contextlib.suppress(PermissionError):  # reading the data names it, if it is of use
                    yield _file(path, path.relative_to(base).as_posix())
    for entry in found:
        if "snapshots" in names and entry.name in ("blobs", "refs"):  # a cache of the hub holds its files twice
            continue
        if entry.is_dir() and depth < _DEEPEST:
            yield from _below(Path(entry.path), base, depth + 1)


def _texts(folder: Path, prefix: str = "", depth: int = 0) -> dict[str, Path]:
    """Small files beside the data, by relative name."""
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_file() and entry.name.lower().endswith(NO_DATA):
                found[prefix + entry.name] = Path(entry.path)
            elif depth < _DEEPEST and not entry.name.startswith(".") and entry.is_dir():
                found.update(_texts(Path(entry.path), f"{prefix}{entry.name}/", depth + 1))
    return found


def split_of(name: str) -> str:
    """The split that a file's name says, or else a folder in it: "train", "val", "test", another word, or ""."""
    for part in reversed(name.split("/")):
        words = _WORD.findall(_NUMBERED.sub("", part.lower()))
        for word in words:
            role = split_role(word)
            if role is not None:
                return word if role == "more" else role
    return ""


def by_split(look: Look, files: Sequence[File]) -> dict[str, list[File]]:
    """Files by the split that their names say, in order: train, val, test, others; one split is "".

    Raises:
        InputError: some names say a split and others none.
    """
    found: dict[str, list[File]] = {}
    for file in files:
        found.setdefault(split_of(file.name), []).append(file)
    if len(found) > 1 and "" in found:
        named = next(name for name in found if name)
        raise InputError(
            f"{look.path} has files of a split ({found[named][0].name} of {named}) and others that name none "
            f"({found[''][0].name}): give the files of one data set, such as with a pattern in quotes."
        )
    return found if len(found) > 1 else {"": list(files)}
