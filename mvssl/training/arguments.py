"""What `mvssl.train` is called with, as a recipe and options."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import reprlib
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mvssl.config.options import RunOptions
from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.config.serialize import build, flatten
from mvssl.recipes import DEFAULT, all_recipes
from mvssl.recipes.files import Fit, override, resolve_recipe
from mvssl.training.fit_recipe import fit_recipe
from pipelines.files import given_path
from pipelines.runtime import InputError, invalid
from pipelines.views.spec import ViewSpec

if TYPE_CHECKING:
    from pipelines.storage.source import Source

_PARTS = {"backbone": Backbone, "optimizer": Optimizer, "evaluation": Evaluation, "projector": Head, "predictor": Head}
_EXAMPLE = 'mvssl.train("demo", data="photos", out="runs/first")'


@dataclass(frozen=True, kw_only=True)
class GivenData:
    """Data that the user gave in Python and not by a path; see `source_of` for what they may be.

    Attributes:
        train: the training images; None for those of `RunOptions.data`.
        val: the validation images; None for those of `RunOptions.val`, or of the data.
    """

    train: object = None
    val: object = None

    @cached_property
    def source(self) -> Source:
        """The training images, opened once."""
        from pipelines.storage.given import source_of

        return source_of(self.train)

    @property
    def images(self) -> object:
        """The training images, as they were given or opened already."""
        return self.__dict__.get("source", self.train)


NOTHING_GIVEN = GivenData()


def given_data(data: object, val: object) -> tuple[GivenData, dict[str, object]]:
    """What the user gave in Python, and `RunOptions.data` and `val` where they are paths or missing.

    Raises:
        InputError: data has no form that images may have; it is not read yet.
    """
    from pipelines.storage.given import check_form, splits_of

    places: dict[str, object] = {}
    data, found = splits_of(data)
    objects = {"data": data, "val": found if val is None else splits_of(val, field="val", of="val")[0]}
    for name, value in list(objects.items()):
        if value is None or isinstance(value, (str, os.PathLike)):
            places[name] = objects.pop(name)
        else:
            check_form(value, name)
    if places.get("val", "") is None:
        del places["val"]
    return GivenData(train=objects.get("data"), val=objects.get("val")), places


def recipe_and_options(
    recipe: object, unnamed: tuple[object, ...], settings: Mapping[str, Any], *, given: GivenData = NOTHING_GIVEN
) -> tuple[Recipe, RunOptions, tuple[str, ...]]:
    """The recipe with its overrides, the options of the run, and lines for its log on what was chosen.

    Args:
        recipe: a `Recipe`, the name of one, or a recipe file; None for the default one, which is fitted to the images.
        unnamed: further arguments without a name, which are refused.
        settings: fields of `RunOptions`, and of `Recipe` to override; tables as {"field": value} are merged, and
            field__within is one of their fields, and views__0__area one of the first view's.
        given: data that are given by no path.

    Raises:
        InputError: an argument is missing, unknown or of the wrong kind.
    """
    if unnamed:
        raise InputError(
            f"mvssl.train was given {1 + len(unnamed)} arguments without a name but must be given one, the recipe: name"
            f" the others, e.g. {_EXAMPLE}."
        )
    _check_recipe(recipe)
    settings = _nested(settings)
    for name in ("data", "out") if given.train is None else ("out",):
        _check_path(name, settings.get(name))
    of_run = {field.name for field in dataclasses.fields(RunOptions)}
    of_recipe = {field.name for field in dataclasses.fields(Recipe)} - of_run
    of_recipe.add("view_preset")
    for name in settings:
        if name not in of_run | of_recipe:
            raise InputError(f"mvssl.train was given {name}, which is no field of Recipe or RunOptions: {_near(name)}.")
    plain = {name: _plain(value) for name, value in settings.items()}
    devices = plain.get("devices")
    if isinstance(devices, list) or (isinstance(devices, int) and not isinstance(devices, bool)):
        plain["devices"] = "".join(f"{each}," for each in devices) if isinstance(devices, list) else str(devices)
    options = build(RunOptions, {name: plain[name] for name in of_run & plain.keys()}, "RunOptions")
    changes = {name: plain[name] for name in of_recipe & plain.keys()}
    notes: tuple[str, ...] = ()

    def fit(base: Recipe, of_file: Mapping[str, Any]) -> Recipe:
        nonlocal notes
        fitted, notes = fit_recipe(
            base,
            dict(flatten(of_file)) | dict(flatten(changes)),
            data=options.data if given.train is None else given.source,
            device=options.device,
            resumes=options.out if options.resume else None,
            default=recipe is None,
        )
        return fitted

    chosen = _recipe(recipe, fit)
    if recipe is None and not options.resume:
        notes = (f"no recipe is named: {chosen.name} is taken (mvssl.recipes has the others)", *notes)
    epochs, optimizer = changes.get("epochs"), changes.get("optimizer")
    if isinstance(epochs, int) and not (isinstance(optimizer, Mapping) and "warmup_epochs" in optimizer):
        chosen, note = fit_warmup(chosen, epochs, resumes=options.out if options.resume else None)
        if note:
            notes = (*notes, f"{note} (optimizer__warmup_epochs sets it)")
    return (override(chosen, changes) if changes else chosen), options, notes


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with names such as optimizer__base_lr or optimizer.base_lr as {"optimizer": {"base_lr": ...}}.

    A view is named by its number or name: views__0__area is {"views": {"0": {"area": ...}}}.

    Raises:
        InputError: a field is given twice, or within a field that has none.
    """
    plain = {name: value for name, value in settings.items() if not _parts(name)[1:]}
    if isinstance(plain.get("views"), Mapping):
        plain["views"] = {str(view): value for view, value in plain["views"].items()}
    given = {tuple(field.split(".")) for field, _ in flatten(plain)}
    for name, value in settings.items():
        *outer, last = path = _parts(name)
        if not outer:
            continue
        _check_within(name, path)
        if tuple(path) in given:
            raise InputError(f"mvssl.train was given {last} of {' '.join(outer)} twice: give it once.", field=path[0])
        given.add(tuple(path))
        table = plain
        for field in outer:
            inner = table.get(field, {})
            if dataclasses.is_dataclass(inner) and not isinstance(inner, type):
                inner = {own.name: getattr(inner, own.name) for own in dataclasses.fields(inner)}
            elif not isinstance(inner, Mapping):
                raise InputError(f"mvssl.train was given both {field} and {name}: give one of them.", field=path[0])
            table[field] = dict(inner)
            table = table[field]
        table[last] = value
    return plain


def _check_within(name: str, path: Sequence[str]) -> None:
    """Raise InputError unless a path is of a field within another one, or within a view."""
    first, *within = path
    if (first == "views" and len(within) in (1, 2)) or (_kind(first) is not None and len(within) == 1):
        return
    outer_names = [own for own in _known() if own == "views" or _kind(own) is not None]
    near = difflib.get_close_matches(first, outer_names, n=1)
    kind = ViewSpec if first == "views" else _kind(first)
    if dataclasses.is_dataclass(kind):
        prefix = "views__0" if first == "views" else first
        remedy = f"take one of {', '.join(f'{prefix}__{own.name}' for own in dataclasses.fields(kind))}"
    elif near:
        remedy = f"did you mean {'__'.join((near[0], *within))}"
    else:
        remedy = _near(within[-1])
    raise InputError(
        f"mvssl.train was given {name}, which is no field of a field ({', '.join(outer_names)} have some): {remedy}."
    )


def _parts(name: str) -> list[str]:
    return name.replace(".", "__").split("__")


def _known() -> dict[str, Any]:
    """Type of every field of `Recipe` and `RunOptions`."""
    return {**typing.get_type_hints(RunOptions), **typing.get_type_hints(Recipe)}


def _kind(name: str) -> Any:
    """The dataclass, or dict, that a field holds; None if it has no fields of its own."""
    hint = _known().get(name)
    return hint if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict else None


def fit_warmup(recipe: Recipe, epochs: int, *, resumes: Path | None) -> tuple[Recipe, str]:
    """Shorten the warm-up in proportion to a run of fewer epochs; a resumed run keeps its warm-up.

    Returns:
        The recipe, and a note on what was changed; "" if nothing was.
    """
    earlier = None
    if resumes is not None:
        from mvssl.runs.folder import RunFolder  # with torch, which a new run need not wait for

        with suppress(InputError):  # the run itself reports it
            earlier = RunFolder(resumes).recipe().optimizer.warmup_epochs
    if earlier is None and not 0 < epochs < recipe.epochs:
        return recipe, ""
    warmup = recipe.optimizer.warmup_epochs
    shorter = earlier if earlier is not None else warmup * epochs / recipe.epochs
    changed = replace(recipe, optimizer=replace(recipe.optimizer, warmup_epochs=min(shorter, recipe.epochs)))
    if earlier is not None or shorter == warmup:
        return changed, ""
    return changed, f"warm-up: {shorter:g} epochs instead of {warmup:g}, in proportion to the run"


def _check_recipe(recipe: object) -> None:
    """Raise InputError unless this is a recipe, or text, a path or None to find one by."""
    if recipe is None or isinstance(recipe, Recipe) or (isinstance(recipe, (str, Path)) and str(recipe)):
        return
    made_by = getattr(recipe, "__name__", None) if callable(recipe) else None
    remedy = f"call it, {made_by}()" if made_by else f"give one, e.g. {_EXAMPLE}"
    raise InputError(
        f"recipe is {reprlib.repr(recipe)} but must be a Recipe, the name of one or a recipe file: {remedy}.",
        field="recipe",
    )


def _recipe(recipe: object, fit: Fit) -> Recipe:
    """The recipe itself (fitted if it is as `all_recipes` makes it), of this name, or in this file."""
    if isinstance(recipe, Recipe):
        make = all_recipes().get(recipe.name)
        return fit(recipe, {}) if make is not None and recipe == make() else recipe
    return resolve_recipe(DEFAULT if recipe is None else str(recipe), fit=fit)


def _check_path(name: str, value: object) -> None:
    """Raise InputError unless `data` or `out` names one place."""
    what = {"data": "a folder of images, a text list, tars, Parquet or converted data", "out": "the run folder"}[name]
    if value is None:
        raise InputError(f"{name} is missing: give {what}, e.g. {_EXAMPLE}.", field=name)
    if isinstance(value, (str, os.PathLike)):
        given_path(value, name)  # refuses an empty one
        if name == "out":
            _check_place(value)
    else:
        remedy = f"give {what}"
        raise InputError(f"{name} is {reprlib.repr(value)} but must be a path: {remedy}.", field=name)


def _check_place(out: str | os.PathLike[str]) -> None:
    """Raise InputError if no disk can hold a folder of this name: too long, or with a zero byte."""
    try:
        os.lstat(out)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            reason = error.strerror if isinstance(error, OSError) else error
            raise invalid("out", out, f"a path that a disk can hold ({reason})", "choose another name") from error


def _near(name: str) -> str:
    """Where a field that is unknown belongs, or which one is meant."""
    for part, kind in _PARTS.items():
        if name in {field.name for field in dataclasses.fields(kind)} - {"name"}:
            return f'write {part}={{"{name}": ...}} or {part}__{name}=...'
    for part, kind in _PARTS.items():
        longer = [field.name for field in dataclasses.fields(kind) if field.name.endswith(f"_{name}")]
        if longer:
            return f"did you mean {part}__{longer[0]}"
    known = [field.name for kind in (Recipe, RunOptions) for field in dataclasses.fields(kind)]
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}" if near else f"take one of {', '.join(known)}"


def _plain(value: Any) -> Any:
    """A Python value as JSON and TOML would give it; other objects unchanged, for the check of types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    import torch

    return str(value) if isinstance(value, torch.device) else value
