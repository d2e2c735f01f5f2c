"""Encoded images by index; a new kind of storage is one new module here with `claims` and `open`."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import cast

from pipelines.runtime import InputError
from pipelines.storage.source import Source
from pipelines.storage.splits import split_paths
from pipelines.storage.subset import align_labels

__all__ = ["Source", "align_labels", "open_source", "split_paths"]


def open_source(path: str | os.PathLike[str], *, progress: Callable[[int], None] | None = None) -> Source:
    """Open the data at `path`: a folder of images, a text list of image files, or converted data.

    Args:
        path: where the data lies.
        progress: called with the number of images found so far while a folder or list is indexed.

    Raises:
        InputError: nothing there, no images, or damaged or unfinished converted data; the message has the remedy.
        OSError: the path cannot be read.
    """
    where = Path(path).expanduser()
    if not where.exists():
        raise InputError(
            f"{where} does not exist: give a folder of images, a text list of image files, or data converted with "
            "mvssl-convert."
        )
    for storage in _storages():
        if storage.claims(where):
            return cast(Source, storage.open(where, progress=progress))
    raise InputError(f"{where} is neither a folder nor a file: give a folder of images, a list, or converted data.")


@cache
def _storages() -> tuple[ModuleType, ...]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    storages = [module for module in modules if hasattr(module, "claims") and hasattr(module, "open")]
    return tuple(sorted(storages, key=lambda module: bool(getattr(module, "ASKED_LAST", False))))
