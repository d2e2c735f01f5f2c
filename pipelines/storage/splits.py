"""Find the train and the val part of a data set."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.storage.folder import is_data_folder

_SPLITS = {"train", "val", "test"}


def split_paths(path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """(train, val) paths of a data set.

    PATH/train.beton and PATH/val.beton (or None) where there is the first; PATH/train and PATH/val where both exist;
    (PATH/train, None) where PATH holds a ``train`` folder and no class folders beside it (COCO has a class called
    "train"); otherwise (PATH, None).
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
