"""Recipes: every public function without parameters in the modules of this package; `mvssl.recipes.NAME()` calls it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar

from mvssl.config.recipe import Recipe
from pipelines.runtime import InputError

PUBLISHED: dict[str, float] = {}
"""Linear-probe top-1 on ImageNet-1k, in per cent, that arXiv 2602.05845 gives for a recipe; complete after
`all_recipes`.
"""

DEFAULT = "photos"
"""The recipe of a run that names none."""

MakeRecipe = TypeVar("MakeRecipe", bound=Callable[[], Recipe])


def published(accuracy: float) -> Callable[[MakeRecipe], MakeRecipe]:
    """Decorate a recipe with its published accuracy, for `PUBLISHED`."""

    def record(make: MakeRecipe) -> MakeRecipe:
        PUBLISHED[make.__name__] = accuracy
        return make

    return record


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a recipe is fitted to.

    Attributes:
        images: number of training images.
        short_side: median short side of the images in pixels.
        device: where the run trains.
        cores: CPU cores of the run.
        ranks: number of processes.
        bf16: whether the CPU has instructions for bf16, which are about twice as fast as float32.
        given: values that the user has chosen, by dotted field such as optimizer.kind; they are kept.
        fits: whether a recipe's steps fit into the device's memory.
    """

    images: int
    short_side: int
    device: Literal["cpu", "cuda"]
    cores: int = 1
    ranks: int = 1
    bf16: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)
    fits: Callable[[Recipe], bool] = lambda _: True

    def text(self, name: str) -> str:
        """A given field as text; "" if it is not given, or is None or False."""
        value = self.given.get(name)
        return "" if value is None or value is False else str(value)

    def number(self, name: str) -> int | None:
        """A given field as a whole number of 1 or more; None if it is not given, or is no such number."""
        text = self.text(name)
        return int(text) if text.isdecimal() and int(text) else None

    def is_given(self, name: str) -> bool:
        """Whether a field, or one in this table or list, is given."""
        return any(one == name or one.startswith(f"{name}.") for one in self.given)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A recipe fitted to a situation, and lines for the log on what was chosen and why."""

    recipe: Recipe
    notes: tuple[str, ...]


FITTED: dict[str, Callable[[Situation], Fitted]] = {}
"""How recipes are fitted to the images and the machine, by name of the recipe; complete after `all_recipes`."""


def fitted_by(fit: Callable[[Situation], Fitted]) -> Callable[[MakeRecipe], MakeRecipe]:
    """Decorate a recipe that a run fits to its images and machine with the function that does, for `FITTED`."""

    def record(make: MakeRecipe) -> MakeRecipe:
        FITTED[make.__name__] = fit
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
