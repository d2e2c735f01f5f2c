"""Recipes: every public function without parameters in the modules of this package; `mvssl.recipes.NAME()` calls it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from mvssl.config.recipe import Recipe
from pipelines.runtime import InputError

PUBLISHED: dict[str, float] = {}
"""Linear-probe top-1 on ImageNet-1k, in per cent, that arXiv 2602.05845 gives for a recipe; complete after
`all_recipes`.
"""

MakeRecipe = TypeVar("MakeRecipe", bound=Callable[[], Recipe])


def published(accuracy: float) -> Callable[[MakeRecipe], MakeRecipe]:
    """Decorate a recipe with its published accuracy, for `PUBLISHED`."""

    def record(make: MakeRecipe) -> MakeRecipe:
        PUBLISHED[make.__name__] = accuracy
        return make

    return record


@cache
def all_recipes() -> dict[str, Callable[[], Recipe]]:
    """Recipe functions by name, sorted."""
    found: dict[str, Callable[[], Recipe]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and not inspect.signature(function).parameters:
                found[name] = function
    return dict(sorted(found.items()))


def get_recipe(name: str, *, field: str = "recipe") -> Recipe:
    """The recipe of this name; `field` is its name in the error, which suggests the nearest recipe."""
    recipes = all_recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name.replace("-", "_"), recipes, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(recipes)}"
        raise InputError(f"{field} is {name!r} but there is no recipe of that name: {hint}")
    return recipes[name]()


def __getattr__(name: str) -> Callable[[], Recipe]:
    if name.startswith("__") or name not in all_recipes():
        raise AttributeError(f"mvssl.recipes has no recipe {name!r}; it has {', '.join(all_recipes())}")
    return all_recipes()[name]


def __dir__() -> list[str]:
    return [*globals(), *all_recipes()]
