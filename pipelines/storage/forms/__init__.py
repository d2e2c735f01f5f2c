"""The forms in which image data sets come (Parquet, tar, zip, CIFAR's binaries, ...), read in place.

A form is one module here. It has

- ``recognise(look) -> bool``: whether what is there has this form, by content (`Look`); names only break ties;
- ``open_form(look, request) -> Found``: its splits, each a `Source` with an index that is built once and random access.

Finding and indexing do not convert: `FormSource` is a `Source` like a folder of images. What a form gives for each
image is a key, encoded bytes or raw pixels, a label, and for all the class names and the split. Modules whose
``FALLBACK`` is True (any tar, any zip) are asked last; those whose ``LOCAL_ONLY`` is True read
no URLs. A new form is one more module; nothing else changes.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import cast

from pipelines.runtime import InputError
from pipelines.storage.forms.base import Found, Request
from pipelines.storage.forms.look import Look

__all__ = ["Found", "Look", "Request", "find_form", "open_form"]


_POINTER = b"version https://git-lfs.github.com/spec/"


def find_form(look: Look) -> ModuleType | None:
    """The module that reads what is there; None for a folder of images, a list, or what no form recognises.

    Raises:
        InputError: a file is not there itself, but what Git keeps in its place.
    """
    pointer = next((file for file in look.files if file.head.startswith(_POINTER)), None)
    if pointer is not None:
        raise InputError(f"{pointer.path} is a pointer of Git LFS and not the file itself: run git lfs pull beside it.")
    return next((form for form in _forms() if form.recognise(look)), None)


def open_form(form: ModuleType, look: Look, request: Request) -> Found:
    """The splits of what `find_form` has found.

    Raises:
        InputError: it is damaged, or is not what it looked like; the message says what was found, and the remedy.
        OSError: it cannot be read.
    """
    return cast(Found, form.open_form(look, request))


@cache
def _forms() -> tuple[ModuleType, ...]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    forms = [module for module in modules if hasattr(module, "recognise")]
    return tuple(sorted(forms, key=lambda module: bool(getattr(module, "FALLBACK", False))))
