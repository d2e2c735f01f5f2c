"""Methods by name: every module of this package that defines `METHOD`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from mvssl.methods.method import Method
from pipelines.runtime import InputError

__all__ = ["Method", "get_method", "methods"]


def methods() -> dict[str, Method]:
    """All methods, by name."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    found = (getattr(module, "METHOD", None) for module in modules)
    return {method.name: method for method in found if isinstance(method, Method)}


def get_method(name: str) -> Method:
    """The method of this name; InputError for an unknown name suggests the nearest one."""
    known = methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "choose one of these."
        raise InputError(f"Recipe.method is {name!r} but must be one of {', '.join(sorted(known))}: {hint}")
    return known[name]
