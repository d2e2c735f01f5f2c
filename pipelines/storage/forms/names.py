"""Splits and classes of the images in an archive, by the folders in their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.runtime import InputError
from pipelines.storage.file_index import is_image_name, is_system_folder
from pipelines.storage.splits import check_parts, is_form_word, split_role

_LONGEST_CLASS = 100  # characters; longer texts are captions
_WNID, _DIGITS = re.compile(r"n\d{8}"), re.compile(r"[\W\d_]+")
_FEW = 10  # first folders of an archive that has splits; more are classes


def is_image_of_archive(name: str) -> bool:
    """Whether a member is an image, and neither hidden nor in a folder of the system (``__MACOSX``)."""
    parts = name.split("/")
    if not is_image_name(parts[-1]):
        return False
    return not any((part.startswith(".") and part != ".") or is_system_folder(part) for part in parts[:-1])


def check_name(path: Path, name: str) -> str:
    """The name of a member without ``./``.

    Raises:
        InputError: it leads out of the archive.
    """
    if "\\" in name and "/" not in name:  # some programs for Windows write these
        name = name.replace("\\", "/")
    parts = PurePosixPath(name).parts
    if ".." in parts or "/" in parts[:1] or not parts or "\0" in name or name[1:3] == ":/":
        raise InputError(
            f"{path} is no archive to trust: the name of {name[:200]!r} leads out of it; get it from its publisher."
        )
    return "/".join(part for part in parts if part != ".")


def arrange(names: Sequence[str], where: Path) -> dict[str, list[tuple[int, str]]]:
    """(index, name below the split's folder) of the images of each split; the only split is "".

    One folder around everything is not counted. First folders are splits if one is a train split and all are splits.

    Raises:
        InputError: other first folders look like parts of one data set, as `check_parts` says; `where` names it.
    """
    rest = _without_common(list(names))
    tops: dict[str, set[str]] = {}
    for name in rest:
        top, slash, below = name.partition("/")
        inner = tops.setdefault(top if slash else "", set())
        if "/" in below:
            inner.add(below.partition("/")[0])
        if len(tops) > _FEW:
            return {"": list(enumerate(rest))}
    roles = {top: split_role(top) for top in tops}
    if len(tops) < 2 or "train" not in roles.values() or None in roles.values():
        check_parts(where, tops, remedy="write it again with those to train on, or unpack it and give their folder")
        return {"": list(enumerate(rest))}
    found: dict[str, list[tuple[int, str]]] = {}
    for index, name in enumerate(rest):
        top, _, below = name.partition("/")
        role = roles[top]
        found.setdefault(top if role == "more" or role is None else role, []).append((index, below))
    return {
        split: list(zip((i for i, _ in pairs), _without_common([n for _, n in pairs]), strict=True))
        for split, pairs in found.items()
    }


def are_classes(stems: Sequence[str]) -> bool:
    """Whether archives of these names are of one class each, as ImageNet's are, and no numbered parts of one."""
    if len(stems) < 2:
        return False
    if all(map(_WNID.fullmatch, stems)):
        return True
    plain = {_DIGITS.sub("", stem) for stem in stems}
    return len(plain) == len(stems) and not any(split_role(stem) for stem in stems)


def _without_common(names: list[str]) -> list[str]:
    """Names without the folders that all of them share, of which the last one is a class."""
    while names:
        top, slash, _ = names[0].partition("/")
        start = top + slash
        if not slash or any(not name.startswith(start) or name.count("/") < 2 for name in names):
            return names
        names = [name[len(start) :] for name in names]
    return names


def class_names(names: Sequence[str]) -> list[str | None]:
    """The class of each image: its first folder; None for images in none, or all in one that only says "images"."""
    found = [name.partition("/")[0] if "/" in name else None for name in names]
    only = set(found)
    if len(only) == 1 and (one := found[0]) is not None and is_form_word(one):
        return [None] * len(found)
    return found


def are_captions(found: Sequence[Any]) -> bool:
    """Whether texts describe images instead of naming classes: long ones, or almost as many as images.

    Of few images many texts are no sign, unless they are of several words.
    """
    texts = [one for one in found if isinstance(one, str)]
    if any(len(one) > _LONGEST_CLASS for one in texts):
        return True
    are_sentences = len(texts) > 3 and sum(len(one.split()) > 2 for one in texts) > len(texts) / 2
    return (len(texts) > 20 or are_sentences) and len(set(texts)) > len(texts) / 2
