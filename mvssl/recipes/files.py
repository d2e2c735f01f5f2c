"""Recipe files: TOML or JSON with a whole recipe, or with overrides of a named one."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mvssl.config.options import Execution
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import EXECUTION, build, from_dict, to_dict
from mvssl.recipes import get_recipe
from pipelines.checks import typed
from pipelines.files import check_nesting, read_regular, strict_text
from pipelines.runtime import InputError, invalid, shown
from pipelines.views.presets import VIEW_PRESETS, adapt_views
from pipelines.views.spec import ViewSpec

logger = logging.getLogger("mvssl")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError if it has a name twice, of which the first would be lost."""
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"{shown(name)} is given twice")
        table[name] = value
    return table


_READERS: dict[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".json": partial(json.loads, object_pairs_hook=_no_twins),
}
_LARGEST = 1 << 22  # bytes of a recipe file
_TOML_NULL = "none"  # TOML has no null


def is_recipe_file(argument: str) -> bool:
    """Whether the argument names a recipe file, by its ending."""
    return Path(argument).suffix.lower() in _READERS


Fit = Callable[[Recipe, Mapping[str, Any]], Recipe]
"""Fits a recipe to the images and the machine, given the fields that a file overrides in it."""


def _unfitted(recipe: Recipe, _: Mapping[str, Any]) -> Recipe:
    return recipe


def resolve_recipe(argument: str, *, fit: Fit = _unfitted) -> Recipe:
    """The recipe of this name or in this file; a named recipe, and the base of a file, is fitted."""
    return load_recipe(argument, fit=fit) if is_recipe_file(argument) else fit(_named(argument), {})


def resolve_with_options(argument: str, *, fit: Fit = _unfitted) -> tuple[Recipe, dict[str, Any]]:
    """As `resolve_recipe`, and the run options that the file sets (`EXECUTION`), by name."""
    return read_recipe(argument, fit=fit) if is_recipe_file(argument) else (fit(_named(argument), {}), {})


def _named(argument: str) -> Recipe:
    """The recipe of this name."""
    if os.path.exists(argument) and Path(argument).suffix:  # False for what cannot be a path
        raise invalid("recipe", argument, "a recipe's name or a file that ends in .toml or .json", "rename the file")
    return get_recipe(argument)


@typed
def load_recipe(path: str | Path, *, fit: Fit = _unfitted) -> Recipe:
    """Read a recipe from a TOML or JSON file.

    The fields are those of `Recipe`, as ``mvssl-train RECIPE --print-config`` writes them. With ``base``, the name of a
    recipe, the others override its fields: tables are merged, lists are replaced, and ``add_views`` adds to its views,
    which ``view_preset`` adapts to other pictures (`pipelines.adapt_views`). A table [views.0] changes one view.
    Replacing ``views`` drops the base's weights of tasks that no longer exist. In TOML "none" stands for None.

    Args:
        path: the file.
        fit: changes the base before its fields are overridden; by default it stays as it is.

    Raises:
        InputError: the file cannot be read, or a field is unknown, missing or not allowed; names file and field.
    """
    recipe, options = read_recipe(path, fit=fit)
    for name, value in options.items():
        if value != getattr(Execution(), name):
            logger.warning(
                "%s: %s is an option of the run and not of the recipe: give %s=%r to mvssl.train",
                *(path, name, name, value),
            )
    return recipe


def read_recipe(path: str | Path, *, fit: Fit = _unfitted) -> tuple[Recipe, dict[str, Any]]:
    """As `load_recipe`, and the run options that the file sets (`EXECUTION`), by name; its base is fitted."""
    path = Path(path)
    null_word = _TOML_NULL if path.suffix.lower() == ".toml" else None
    try:
        content = _read(path)
        given = {name: content[name] for name in EXECUTION if name in content}
        execution = build(Execution, given, "recipe", null_word=null_word)
        return _recipe(content, null_word=null_word, fit=fit), {name: getattr(execution, name) for name in given}
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read(path: Path) -> Mapping[str, Any]:
    """The contents of the file."""
    if not is_recipe_file(path.name):
        raise invalid("the ending", path.suffix, ".toml or .json", "rename the file")
    try:
        content = _READERS[path.suffix.lower()](strict_text(read_regular(path, most=_LARGEST)))
        check_nesting(content)
    except OSError as error:
        raise InputError(f"the recipe file cannot be read ({error.strerror or error}): check the path.") from error
    except InputError as error:
        raise InputError(f"the recipe file is not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        error = ValueError("it is nested too deep") if isinstance(error, RecursionError) else error
        kind = path.suffix[1:].upper()
        raise InputError(f"the recipe file is not valid {kind} ({error}): correct it there.") from error
    if not isinstance(content, Mapping):
        raise InputError("the recipe file must hold one JSON object with a recipe's fields: put it in braces.")
    return content


def _recipe(content: Mapping[str, Any], *, null_word: str | None, fit: Fit) -> Recipe:
    """The recipe of the contents of a file."""
    own = {name: value for name, value in content.items() if name not in ("base", "add_views")}
    added = content.get("add_views", [])
    if not isinstance(added, list):
        raise invalid("add_views", added, "a list of views", "write it as a list of tables, [[add_views]] in TOML")
    for i, view in enumerate(added):
        build(ViewSpec, view, f"add_views[{i}]", null_word=null_word)
    if "base" not in content:
        if added:
            raise InputError("add_views is given without base: name the recipe whose views they are added to.")
        if "view_preset" in own:
            raise InputError("view_preset is given without base: name the recipe whose views it adapts.")
        if "views" not in own:
            raise InputError('neither base nor views is given: name a recipe, e.g. base = "demo", or give all fields.')
        return from_dict(own, null_word=null_word)
    if not isinstance(content["base"], str):
        raise invalid("base", content["base"], "the name of a recipe", "see mvssl-train --list")
    base = fit(get_recipe(content["base"], field="base"), own)
    return override(base, own, added=added, null_word=null_word)


def override(
    recipe: Recipe, fields: Mapping[str, Any], *, added: Sequence[Any] = (), null_word: str | None = None
) -> Recipe:
    """The recipe with other values of some fields, in plain form.

    Tables are merged and lists replaced; a table as `views` changes fields of single ones, by number or name.
    `view_preset`, which is no field, adapts the views (`adapt_views`) before. Replacing `views` drops the weights of
    tasks that no longer exist; `added` are added to the views.
    """
    fields = dict(fields)
    if "view_preset" in fields:
        recipe = with_view_preset(recipe, fields.pop("view_preset"))
        if "views" in fields and not isinstance(fields["views"], Mapping):
            raise InputError("view_preset and views are both given, and exclude each other: leave one of them out.")
    base = to_dict(recipe)
    if isinstance(fields.get("views"), Mapping):
        fields["views"] = _changed_views(base["views"], fields["views"])
    if isinstance(fields.get("views"), list):
        kept = {view.get("task") for view in fields["views"] if isinstance(view, Mapping)}
        base["task_weights"] = {task: weight for task, weight in base["task_weights"].items() if task in kept}
    merged = _merge(base, fields)
    if added and isinstance(merged["views"], list):
        merged["views"] = [*merged["views"], *added]
    return from_dict(merged, null_word=null_word)


def _changed_views(views: Sequence[Mapping[str, Any]], changes: Mapping[str, Any]) -> list[Any]:
    """Views in plain form with the fields in `changes` of single ones, by number or name."""
    numbers = {view["name"]: n for n, view in enumerate(views)} | {str(n): n for n in range(len(views))}
    changed: list[Any] = list(views)
    for view, fields in changes.items():
        if str(view) not in numbers:
            raise InputError(
                f"views has the entry {str(view)!r} but as a table may only have 0 to {len(views) - 1} or "
                f"{', '.join(each['name'] for each in views)}: name a view that is to change, or give all as a list of "
                "tables, [[views]] in TOML."
            )
        n = numbers[str(view)]
        changed[n] = _merge(changed[n], fields) if isinstance(fields, Mapping) else fields
    return changed


def with_view_preset(recipe: Recipe, preset: object) -> Recipe:
    """The recipe with its views adapted by a preset; None and TOML's "none" change nothing.

    Raises:
        InputError: there is no preset of this name.
    """
    if preset is None or preset == _TOML_NULL:
        return recipe
    if not isinstance(preset, str):
        raise invalid("view_preset", preset, f"one of {', '.join(VIEW_PRESETS)}", "give the name of a preset")
    return dataclasses.replace(recipe, views=adapt_views(recipe.views, preset))


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`old` with the values of `new`; where both have a table, the tables are merged."""
    merged = dict(old)
    for name, value in new.items():
        before = old.get(name)
        merged[name] = _merge(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged
