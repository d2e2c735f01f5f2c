"""Finds the train and val splits of a data set and gives both the same labels."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.files import given_path
from pipelines.runtime import InputError
from pipelines.storage.beton_format import is_beton_name
from pipelines.storage.file_index import FORM_WORDS, RUN_FILES, is_data_folder, is_image_file
from pipelines.storage.manifest import MANIFEST, format_of
from pipelines.storage.source import Source

Role = Literal["train", "val", "test", "more"]

_ROLES: dict[Role, re.Pattern[str]] = {
    "train": re.compile("train|training|train(ing)?set|trainval|trn"),
    "val": re.compile(
        "val|valid|validation|validate|(val|valid|validation)set|minival|dev|devel|devset|eval|evaluation"
    ),
    "test": re.compile("tests?|testing|testset|tst"),
    "more": re.compile(  # splits only beside those above
        "extra|(un)?labell?ed|query|gallery|holdout|unseen|ood|preds?|predict|predictions?"
    ),
}
_FORM = FORM_WORDS
# What each class may have alike, so that sharing it says nothing.
_INNER = re.compile(f"{_FORM.pattern}|annotations?|labels?|masks?|boxes|rgb|gray|depth|left|right|thumb(nail)?s")
_PIECES = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+|[^\W\d_]+")
_TWO_WORDS = re.compile(r"(hold)[\W_]?(out)", re.IGNORECASE)
_SERIES = re.compile(r"\d+|[\W_]+")
_BUCKET = re.compile(r"[0-9a-f]{1,4}|\d+", re.IGNORECASE)
_FEW = 10  # folders of a data set that has train and val; more may be classes
_FEW_CLASSES = 3
_DEEPEST = 2  # levels below the first folders at which splits are looked for, as in ILSVRC/Data/CLS-LOC
_LOOKED_AT = 32  # folders whose subfolders are compared
_ENTRIES = 4096  # of a folder, until it counts as one without subfolders
_NAMED = 6  # folders named in an error


def split_paths(path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """Paths (train, val) of the splits of a data set; (PATH, None) if its first folders are no splits but classes.

    Splits are folders (or .beton files) of the usual names: ``train``, ``val``, ``validation``, ``dev``, ``test``, ...
    in any case and with suffixes (``val2017``, ``train_images``, ``imagenet-val``). ``train`` alone is a split unless
    other folders with images are next to it (COCO has a class "train"). ``test`` is never used.

    Raises:
        InputError: folders look like splits but not like one train and at most one val; or they look like splits or
            parts because they have the same subfolders.
    """
    root = given_path(path, "data")
    if not root.is_dir() or format_of(root) is not None:
        return root, None
    with os.scandir(root) as entries:
        found = [(entry.name, is_data_folder(entry)) for entry in entries if not entry.name.startswith(".")]
    betons = sorted(name for name, is_folder in found if not is_folder and is_beton_name(name))
    if any(_role(Path(name).stem) == "train" for name in betons):
        for plain in {"train.beton", "val.beton"} & set(betons):  # go before other names
            betons = [name for name in betons if name == plain or _role(Path(name).stem) != _role(Path(plain).stem)]
        return _one_of_each(root, [_Part.of(name, Path(name).stem) for name in betons], others=())
    parts = [_Part.of(name, name) for name in sorted(name for name, is_folder in found if is_folder)]
    usual = [part.name for part in parts if part.name in ("train", "val")]
    if any(part.role is not None for part in parts):
        parts = [part for part in parts if part.name == "train" or _holds_data(root / part.name)]
    if len(usual) == 2 and len(parts) <= _FEW:
        return root / "train", root / "val"
    result = _splits(
        root, [part for part in parts if part.names_split], [part for part in parts if not part.names_split]
    )
    if result is None:
        _check_subfolders(root, [part.name for part in parts])
        return root, None
    return result


@dataclass(frozen=True)
class _Part:
    """A first-level folder: its name, the split that it names, and the other words of its name."""

    name: str
    role: Role | None
    stem: tuple[str, ...]

    @property
    def names_split(self) -> bool:
        """Whether the name says nothing but a split."""
        return self.role is not None and not self.stem

    @classmethod
    def of(cls, name: str, stem: str) -> _Part:
        return cls(name, _role(stem), _stem(stem))


def _words(name: str) -> list[str]:
    """Words of a name in lower case, cut at other characters, digits and capitals, without numbers and letters."""
    pieces = _PIECES.findall(_TWO_WORDS.sub(r"\1\2", name) if name.isascii() else name)
    return [piece.lower() for piece in pieces if not piece.isdigit() and (len(piece) > 1 or len(pieces) == 1)]


def _role(name: str) -> Role | None:
    """The split that a name has as its first or last word of weight."""
    words = [word for word in _words(name) if not _FORM.fullmatch(word)]
    roles = (role for role, words_of in _ROLES.items() if any(map(words_of.fullmatch, words[:1] + words[-1:])))
    return next(roles, None)


def split_role(name: str) -> Role | None:
    """The split that a name says: "train", "val", "test", "more" (extra, unlabeled, ...); None for another name."""
    return _role(name)


def is_form_word(name: str) -> bool:
    """Whether the name of a folder says only that there are images: ``images``, ``data``, ``jpg``."""
    return _FORM.fullmatch(name.lower()) is not None


def _stem(name: str) -> tuple[str, ...]:
    """The words that name neither a split nor the form of the data: of ``imagenet-val`` ``imagenet``."""
    known = (_FORM, *_ROLES.values())
    return tuple(word for word in _words(name) if not any(words_of.fullmatch(word) for words_of in known))


def _splits(root: Path, named: Sequence[_Part], others: Sequence[_Part]) -> tuple[Path, Path | None] | None:
    """The splits among folders that hold data; None if the folders are classes."""
    roles = {part.role for part in named}
    if not named:  # imagenet-train and imagenet-val
        stems = [part.stem for part in others if part.role == "train"]
        group = [part for part in others if part.role is not None and part.stem in stems]
        rest = [part for part in others if part not in group]
        if len({part.role for part in group}) < 2 or len(rest) > _FEW_CLASSES:
            return None
        return _one_of_each(root, group, others=rest)
    if not others:
        return None if len(named) == 1 and "train" not in roles else _one_of_each(root, named, others=())
    if roles >= {"train", "val"}:
        return _one_of_each(root, named, others=others)
    few = len(others) <= _FEW_CLASSES  # among many classes some may have these names
    if "train" in roles and ((few and "test" in roles) or all(part.role is not None for part in others)):
        return _one_of_each(root, named, others=others)
    return None


def _one_of_each(root: Path, parts: Sequence[_Part], *, others: Sequence[_Part]) -> tuple[Path, Path | None]:
    """Paths of the only train and the only val, if there are no others and no splits of unclear use."""
    of = {role: [part.name for part in parts if part.role == role] for role in _ROLES}
    if len(of["train"]) != 1 or len(of["val"]) > 1 or (of["more"] and not of["val"]) or others:
        raise _ambiguous(root, [part.name for part in (*parts, *others)], "look like splits")
    return root / of["train"][0], root / of["val"][0] if of["val"] else None


def _ambiguous(root: Path, names: Sequence[str], why: str, remedy: str = "") -> InputError:
    named = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    folders = "folders" if len(names) > 1 else "only folder"
    train = next((name for name in names if _role(name) == "train"), names[0])
    val = next((name for name in names if name != train and _role(name) in ("val", "test")), None)
    measure = "" if val is None else f", and what to measure on, such as {root / val}, with --val"
    give = remedy or f"give the images to train on, such as {root / train}{measure}"
    return InputError(
        f"data is {str(root)!r}, whose {folders} {named} {why} of one data set and not like its classes, but must be "
        f"one split, or have one train and one val: {give}; if the folders are classes, or several are to be used as "
        "one, give a text list of the images (with their classes).",
        field="data",
    )


def _check_subfolders(root: Path, names: Sequence[str]) -> None:
    """Check that the folders neither hold splits nor look like parts of one data set; see `check_parts`."""
    inner: dict[str, set[str]] = {}
    for name in names[:_LOOKED_AT]:
        inner[name] = set(_subfolders(root / name))
        if not inner[name]:
            break
    check_parts(root, inner, only=len(names) == 1)
    for folder in (folder for name in names[:_FEW] for folder in _with_splits(root / name, _DEEPEST)):
        found = [str((folder / name).relative_to(root)) for name in _splits_in(folder)]
        raise _ambiguous(root, found, "look like splits")


def _with_splits(folder: Path, depth: int) -> Iterator[Path]:
    """Folders that hold splits, at this one or below."""
    names = list(_subfolders(folder))
    if _splits_in(folder):
        yield folder
    elif depth and len(names) <= _FEW:
        for name in names:
            yield from _with_splits(folder / name, depth - 1)


def _splits_in(folder: Path) -> list[str]:
    """Subfolders with data that are a train and a val or test split by their names; [] without these two."""
    parts = [_Part.of(name, name) for name in _subfolders(folder)]
    for train in (part for part in parts if part.role == "train"):
        group = [part for part in parts if part.stem == train.stem and part.role in ("train", "val", "test")]
        with_data = [part for part in group if _holds_data(folder / part.name)] if len(group) > 1 else []
        if {"train"} < {part.role for part in with_data}:
            return [part.name for part in sorted(with_data, key=lambda part: list(_ROLES).index(part.role or "more"))]
    return []


def check_parts(root: Path, inner: Mapping[str, set[str]], *, only: bool = False, remedy: str = "") -> None:
    """Check that first folders are no splits of unusual names: folds, years or places with the same classes in each.

    Args:
        root: the folder or archive.
        inner: names of the subfolders, by folder.
        only: whether it is one folder, which may be a split by its name.
        remedy: what to do with an archive; of a folder the images of one part are given.

    Raises:
        InputError: they have two or more subfolders in common, and at least half of each.
    """
    names = list(inner)
    below = [
        {name.casefold() for name in folders if not _INNER.fullmatch(name.casefold())} for folders in inner.values()
    ]
    if not names or not all(below):
        return
    if only and _role(names[0]) is not None and not _stem(names[0]) and len(below[0]) > 1:
        raise _ambiguous(root, names, "looks like a split", remedy)
    counts = Counter(name for own in below for name in own)
    shared = [{name for name in own if counts[name] > 1} for own in below]
    if len(set().union(*shared)) < 2 or any(2 * len(both) < len(own) for both, own in zip(shared, below, strict=True)):
        return
    series = len({_SERIES.sub("", name).casefold() for name in names}) == 1
    buckets = all(_BUCKET.fullmatch(word) for word in set().union(*below))
    if buckets and (all(map(_BUCKET.fullmatch, names)) or not (series or any(_role(name) for name in names))):
        return  # numbered folders that only keep folders small
    common = sorted(set.intersection(*below) or set().union(*shared))
    raise _ambiguous(
        root, names, f"hold the same subfolders ({', '.join(common[:3])}, ...) and so look like parts", remedy
    )


def _subfolders(folder: Path) -> Iterator[str]:
    with suppress(PermissionError), os.scandir(folder) as entries:
        for entry in islice(entries, _ENTRIES):
            if is_data_folder(entry):
                yield entry.name


def _holds_data(folder: Path) -> bool:
    """Whether images or converted data are in the folder, at any depth."""
    waiting, seen = [str(folder)], set()
    while waiting:
        at = waiting.pop()
        real = os.path.realpath(at)
        if real in seen:  # links in a cycle
            continue
        seen.add(real)
        with suppress(PermissionError), os.scandir(at) as entries:  # reading such a folder as data names it
            here = {entry.name: entry for entry in entries}
            if here.keys() >= RUN_FILES:
                continue
            for entry in here.values():
                if is_data_folder(entry):
                    waiting.append(entry.path)
                elif is_image_file(entry) or entry.name == MANIFEST or is_beton_name(entry.name):
                    return True
    return False


def align_labels(source: Source, classes: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Labels of `source` (int64 [len], -1 stays -1) renumbered to `classes`, by class name.

    A val folder that lacks a class of the train folder numbers its classes differently: compare labels only after this.

    Raises:
        InputError: `source` has a class that is not in `classes`.
    """
    if source.classes == classes:
        return source.labels
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in source.classes if name not in label_of]
    if unknown:
        raise InputError(
            f"{source.location} has the class {unknown[0]!r} ({len(unknown)} such), which is not among the "
            f"{len(classes)} classes of the train split: give both splits the same classes."
        )
    renumbered = np.array([label_of[name] for name in source.classes] + [-1], dtype=np.int64)
    return renumbered[source.labels]  # label -1 picks the last entry: -1
