"""Finds the train and val splits of a data set and gives both the same labels."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.runtime import InputError
from pipelines.storage.file_index import is_data_folder
from pipelines.storage.source import Source

_SPLITS = {"train", "val", "test"}


def split_paths(path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """Paths (train, val) of the splits of a data set.

    - PATH/train.beton and PATH/val.beton (or None), if the first exists;
    - PATH/train and PATH/val, if both exist;
    - (PATH/train, None), if PATH has a ``train`` folder and no class folders next to it (COCO has a class "train");
    - (PATH, None) otherwise.
    """
    root = Path(path)
    train, val = root / "train.beton", root / "val.beton"
    if train.is_file():
        return train, val if val.is_file() else None
    train, val = root / "train", root / "val"
    if not train.is_dir():
        return root, None
    if val.is_dir():
        return train, val
    with os.scandir(root) as entries:
        others = {entry.name for entry in entries if is_data_folder(entry)} - _SPLITS
    return (root, None) if others else (train, None)


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
