"""Encoded images by index; a new storage is one new module here with `can_open` and `open_path`."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import cast

from pipelines.files import given_path
from pipelines.names import Url
from pipelines.runtime import InputError
from pipelines.storage.remote_files import RemoteOptions
from pipelines.storage.remote_open import open_remote, remote_splits
from pipelines.storage.source import Source
from pipelines.storage.splits import align_labels
from pipelines.storage.splits import split_paths as _split_folder

__all__ = ["RemoteOptions", "Source", "align_labels", "check_outside", "open_source", "split_paths"]


def open_source(
    path: str | os.PathLike[str],
    *,
    progress: Callable[[int], None] | None = None,
    remote: RemoteOptions | None = None,
) -> Source:
    """Open the data at `path`: a folder of images, a text list of image files, converted data, or tars, zips, Parquet
    or Arrow files in place. At a URL: converted data, tars, zips and Parquet.

    Args:
        path: the data; a pattern such as ``train-{0000..0009}.tar`` for some files; ``PATH#NAME`` for a split.
        progress: called with the number of images found so far while a folder or list is indexed.
        remote: how data at a URL are read and cached; None for the defaults.

    Raises:
        InputError: the path does not exist, holds no images, or is damaged or unfinished converted data.
        OSError: the path cannot be read.
    """
    where = given_path(path, "path").expanduser()
    if isinstance(where, Url):
        return open_remote(where, remote or RemoteOptions(), progress)
    for storage in _storages():
        if storage.can_open(where):
            return cast(Source, storage.open_path(where, progress=progress))
    if not where.exists():
        raise InputError(
            f"{where} does not exist: give a folder of images, a text list of image files, tars, Parquet or Arrow "
            "files (a folder or a pattern in quotes), or data converted with mvssl-convert."
        )
    raise InputError(f"{where} is neither a folder nor a file: give a folder of images, a list, or converted data.")


def split_paths(path: str | os.PathLike[str], *, remote: RemoteOptions | None = None) -> tuple[Path, Path | None]:
    """Paths (train, val) of the splits of a data set; (PATH, None) if it has one. See `splits.split_paths`.

    Of tars, zips, Parquet and Arrow files they are ``PATH#train`` and ``PATH#val``, which `open_source` opens.
    Converted data at a URL are in ``train`` and ``val``; `remote` says how they are asked for.

    Raises:
        InputError: there are splits, but not one train and at most one val.
    """
    where = given_path(path, "data").expanduser()
    if isinstance(where, Url):
        return remote_splits(where, remote or RemoteOptions())
    for storage in _storages():
        if hasattr(storage, "split_paths"):
            found: tuple[Path, Path | None] | None = storage.split_paths(where)
            if found is not None:
                return found
    return _split_folder(path)


def check_outside(out: Path, data: Path, *, field: str) -> None:
    """Check that what is written to `out` does not become an image of the folder `data`, as the pictures of a run do.

    Converted data and lists name their images, so files beside those are no images.

    Raises:
        InputError: `out` is in a folder of images, or is that folder.
    """
    for storage in _storages():
        data = storage.base_of(data) if hasattr(storage, "base_of") else data
    images, written = data.expanduser().resolve(), out.expanduser().resolve()
    if not images.is_dir() or not (written == images or images in written.parents):
        return
    scans = ("FALLBACK", "SCANS_FOLDER")
    if any(storage.can_open(images) for storage in _storages() if not any(hasattr(storage, name) for name in scans)):
        return
    raise InputError(
        f"{field} is {str(out)!r} but must be outside the images in {data}, or pictures written there become images: "
        f"choose another place, such as {images.parent / (images.name + '-' + (written.name or 'out'))}.",
        field=field,
    )


@cache
def _storages() -> tuple[ModuleType, ...]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    storages = [module for module in modules if hasattr(module, "can_open")]
    return tuple(sorted(storages, key=lambda module: bool(getattr(module, "FALLBACK", False))))
