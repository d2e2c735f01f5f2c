"""ImageNet as Kaggle has it: the zip of the localisation challenge, or the folder unpacked from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import open_regular, read_regular
from pipelines.runtime import InputError
from pipelines.storage.file_index import scan_folder
from pipelines.storage.forms.base import NO_LABEL, FormSource, Found, Labels, Request, number_labels, unlabelled
from pipelines.storage.forms.blobs import FileBlob, text_of
from pipelines.storage.forms.look import Look
from pipelines.storage.forms.parquet import may_be_deep_name
from pipelines.storage.forms.zip_reader import zip_entries
from pipelines.storage.forms.zips import MAGICS, ZipIndex
from pipelines.storage.source import file_name

_DATA = "ILSVRC/Data/CLS-LOC"
_SOLUTION, _MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_WNID = re.compile(r"n\d{8}")
_LARGEST = 1 << 28  # bytes of a table
_LOOKED_AT = 10_000  # files of a zip, which begins with annotations or images


def recognise(look: Look) -> bool:
    """Whether SRC is a folder with Kaggle's layout, or a zip of it."""
    if look.is_folder and _root(look.path) is not None:
        return True
    return len(look.files) == 1 and look.files[0].head.startswith(MAGICS) and _is_zip(look.files[0].path)


def _root(path: Path) -> Path | None:
    """The folder with train and val."""
    found = next((root for root in (path / _DATA, path / "Data/CLS-LOC") if (root / "train").is_dir()), None)
    if found is None and path.name == "CLS-LOC" and (path / "train").is_dir() and (path / "val").is_dir():
        return path
    return found


def _is_zip(path: Path) -> bool:
    blob = FileBlob(path)
    try:
        for number, entry in enumerate(zip_entries(path, blob)):
            if entry.name.endswith(_SOLUTION) or f"{_DATA}/" in entry.name:
                return True
            if number > _LOOKED_AT:
                return False
        return False
    except InputError:
        return False
    finally:
        blob.close()


def open_form(look: Look, request: Request) -> Found:
    """Open train, val and test; val's classes are those of LOC_val_solution.csv."""
    for option, value in (("--image", request.image), ("--label", request.label)):
        if value is not None and value != NO_LABEL:
            raise InputError(
                f"{option} is {value!r} but must be left out for ImageNet of Kaggle: leave it out.", field=option
            )
    root = _root(look.path) if look.is_folder else None
    splits = _of_zip(look, request) if root is None else _of_folder(look.path, root, request)
    kind = "zip" if root is None else "folder"
    return Found(what=f"ImageNet of Kaggle ({kind})", splits=splits)


def _of_zip(look: Look, request: Request) -> dict[str, FormSource]:
    path = look.files[0].path
    index = ZipIndex([path], request)
    at: dict[str, list[int]] = {}
    for number, name in enumerate(index.names):
        _, found, rest = name.partition(f"{_DATA}/")
        split, slash, _ = rest.partition("/")
        if found and slash:
            at.setdefault(split, []).append(number)
    tables = {name.rpartition("/")[2]: name for name in index.texts}
    solution = _solution(index.text(tables[_SOLUTION]), path) if _SOLUTION in tables else None
    known = _mapping(index.text(tables[_MAPPING]), path) if _MAPPING in tables else None
    splits: dict[str, FormSource] = {}
    for split in (name for name in ("train", "val", "test") if name in at):
        names = [index.names[number].partition(f"{_DATA}/{split}/")[2] for number in at[split]]
        keys, labels = _labelled(path, split, names, solution, known, request)
        splits[split] = index.source(look.path, at[split], keys, labels)
    if "train" not in splits and "val" not in splits:
        raise InputError(f"{path} has no images below {_DATA}/train or {_DATA}/val: download it again.")
    return splits


def _of_folder(src: Path, root: Path, request: Request) -> dict[str, FormSource]:
    folders = [src, root, *list(root.parents)[:3]]
    solution_at = next((folder / _SOLUTION for folder in folders if (folder / _SOLUTION).is_file()), None)
    mapping_at = next((folder / _MAPPING for folder in folders if (folder / _MAPPING).is_file()), None)
    solution = None if solution_at is None else _solution(_table(solution_at), solution_at)
    known = None if mapping_at is None else _mapping(_table(mapping_at), mapping_at)
    splits: dict[str, FormSource] = {}
    for split in ("train", "val", "test"):
        if not (root / split).is_dir():
            continue
        index = scan_folder(root / split, progress=request.progress)
        if not len(index.keys):
            continue
        names = list(index.keys)
        keys, labels = _labelled(root, split, names, solution, known, request)
        splits[split] = FormSource(
            root / split,
            keys=keys,
            labels=labels,
            nbytes=index.nbytes,
            reader=FilesReader(root / split, names),
            deep=[n for n, name in enumerate(names) if may_be_deep_name(name)],
        )
    if not splits:
        raise InputError(f"{root} holds no images: unpack the zip again, or give the zip itself.")
    return splits


def _table(path: Path) -> bytes:
    try:
        return read_regular(path, most=_LARGEST)
    except ValueError as error:
        raise InputError(f"{path} is no table of Kaggle's ({error}): download it again.") from None


def _labelled(
    where: Path,
    split: str,
    names: Sequence[str],
    solution: dict[str, str] | None,
    known: set[str] | None,
    request: Request,
) -> tuple[list[str], Labels]:
    """Keys (class and file) and labels of the images of a split."""
    if split == "test" or request.label == NO_LABEL:
        return list(names), unlabelled(len(names))
    classes: list[str] = []
    for name in names:
        folder, slash, base = name.rpartition("/")
        wnid = folder.partition("/")[0] if slash else None
        if wnid is None and split == "val":
            if solution is None:
                raise InputError(
                    f"{where} has val images without classes and no {_SOLUTION}: put that file of Kaggle's beside "
                    "ILSVRC, or use --label none."
                )
            wnid = solution.get(base.partition(".")[0])
        if wnid is None:
            raise InputError(f"{where} has the image {split}/{name[:200]} without a class: download it again.")
        classes.append(wnid)
    wrong = set() if known is None else set(classes) - known
    if wrong:
        raise InputError(
            f"{where} has the class {min(wrong)!r} in {split}, which is not in {_MAPPING}: give files of one download."
        )
    keys = [name if "/" in name else f"{wnid}/{name}" for name, wnid in zip(names, classes, strict=True)]
    return keys, number_labels(classes, where=where)


def _solution(data: bytes, path: Path) -> dict[str, str]:
    """WordNet id of each val image: lines of ``ILSVRC2012_val_00048981,n03995372 85 1 499 272``."""
    found = {}
    for line in text_of(path, data).split("\n")[1:]:
        image, _, prediction = line.strip().partition(",")
        words = prediction.split()
        if not image:
            continue
        if not words or not _WNID.fullmatch(words[0]):
            raise InputError(f"{path}: {_SOLUTION} has the line {line[:100]!r} without a class: download it again.")
        found[image] = words[0]
    return found


def _mapping(data: bytes, path: Path) -> set[str]:
    """The WordNet ids of all classes: lines of ``n01440764 tench, Tinca tinca``."""
    return {words[0].rstrip(",") for line in text_of(path, data).split("\n") if (words := line.split())}


class FilesReader:
    """Reads files of a folder."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = str(folder)
        self._names = names

    def read(self, row: int) -> Any:
        """See `Reader`."""
        with open_regular(Path(self._folder, file_name(self._names[row]))) as file:
            return np.frombuffer(file.read(), np.uint8)

    def close(self) -> None:
        """See `Reader`."""
