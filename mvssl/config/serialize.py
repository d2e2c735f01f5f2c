"""Recipes to and from plain JSON values, and the differences of two recipes."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mvssl.config.recipe import Recipe
from pipelines.files import given_path
from pipelines.runtime import InputError, invalid

T = TypeVar("T")
_LONGEST_LIST = 1000  # of views, layers and the like

EXECUTION = ("step_mode", "compile", "channels_last")
"""Fields of `Execution` that recipes had before; files written then still hold them."""


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return plain


def flatten(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted field, value) for every leaf of a recipe's plain form; list items are numbered."""
    for key, value in plain.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield from flatten({str(i): item for i, item in enumerate(value)}, f"{name}.")
        else:
            yield name, value


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each dotted field in which two plain recipes differ."""
    was, now = dict(flatten(old)), dict(flatten(new))
    absent = "(absent)"
    values = {name: (was.get(name, absent), now.get(name, absent)) for name in dict.fromkeys([*was, *now])}
    return {name: (before, after) for name, (before, after) in values.items() if before != after}


def recorded_recipe(plain: Mapping[str, Any]) -> Recipe:
    """The recipe that a run has recorded; as `from_dict`, but runs of versions without a linear probe have none."""
    evaluation = plain.get("evaluation")
    if isinstance(evaluation, Mapping):
        plain = {**plain, "evaluation": {"probe": False, **evaluation}}
    return from_dict(plain)


def from_dict(plain: Mapping[str, Any], *, null_word: str | None = None) -> Recipe:
    """The recipe of its plain form; the inverse of `to_dict`.

    Args:
        plain: the plain form; fields with a default may be missing, and those of `EXECUTION` are left out.
        null_word: text that stands for None, for formats without null.

    Raises:
        InputError: a field is unknown, missing, of the wrong type, or not allowed.
    """
    if isinstance(plain, Mapping):
        plain = {name: value for name, value in plain.items() if name not in EXECUTION}
    return build(Recipe, plain, "recipe", null_word=null_word)


def build(kind: type[T], plain: Any, where: str, *, null_word: str | None = None) -> T:
    """Build the dataclass `kind` from a mapping of its fields, nested ones included; `where` names it in errors."""
    if not isinstance(plain, Mapping):
        raise invalid(where, plain, f"a table of {kind.__name__}'s fields", "write it as a table (an object in JSON)")
    hints = _hints(typing.cast("Any", kind))
    unknown = sorted(set(plain) - set(hints))
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "take it out, or use the version of mvssl that wrote it."
        raise InputError(f"{where} has the unknown field {unknown[0]!r} but may only have {', '.join(hints)}: {remedy}")
    required = [field.name for field in dataclasses.fields(typing.cast("Any", kind)) if _is_required(field)]
    missing = [name for name in required if name not in plain]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}: add what is missing.")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}", null_word) for name, value in plain.items()})


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, which take long to find."""
    return typing.get_type_hints(kind)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a dataclass cannot be built without this field."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, where: str, null_word: str | None) -> Any:
    """One plain value, converted to the type hint."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (null_word is not None and value == null_word):
            return None
        if bool in arguments and isinstance(value, bool):
            return value
        kinds = [kind for kind in arguments if kind is not type(None)]
        fitting = (kind for kind in kinds if (typing.get_origin(kind) is tuple) == isinstance(value, list))
        return _value(next(fitting, kinds[0]), value, where, null_word)
    if origin is typing.Literal:
        if value not in arguments:
            raise invalid(where, value, f"one of {', '.join(arguments)}", "choose one")
        return value
    if origin is tuple:
        return _tuple(arguments, value, where, null_word)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise invalid(where, value, "a table", "write it as a table (an object in JSON)")
        return {key: _value(arguments[1], item, f"{where}.{key}", null_word) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, where, null_word=null_word)
    return _scalar(hint, value, where)


def _tuple(kinds: tuple[Any, ...], value: Any, where: str, null_word: str | None) -> tuple[Any, ...]:
    """A list as a tuple of these types; `type, ...` has any length."""
    any_length = kinds[-1] is Ellipsis
    if not isinstance(value, list):
        of_tables = dataclasses.is_dataclass(kinds[0])
        remedy = "write it as a list of tables, [[...]] in TOML" if of_tables else "write it in brackets, as [1, 2]"
        raise invalid(where, value, "a list", remedy)
    if len(value) > _LONGEST_LIST:
        raise InputError(f"{where} is a list of {len(value):,} but must have at most {_LONGEST_LIST:,}: shorten it.")
    if not any_length and len(value) != len(kinds):
        raise invalid(where, value, f"a list of {len(kinds)}", f"give {len(kinds)} values")
    each = [kinds[0]] * len(value) if any_length else kinds
    return tuple(
        _value(kind, item, f"{where}[{i}]", null_word) for i, (kind, item) in enumerate(zip(each, value, strict=True))
    )


def _scalar(kind: type, value: Any, where: str) -> Any:
    """A string, bool or number; an int is a float, a bool is neither."""
    if kind is float:
        if isinstance(value, float):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
    elif kind is Path:
        if isinstance(value, (str, os.PathLike)):
            return given_path(value, where)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    allowed, remedy = {
        str: ("a string", "put it in quotation marks"),
        bool: ("true or false", "write it without quotation marks"),
        int: ("a whole number", "write it without quotation marks and decimal point"),
        float: ("a number", "write it without quotation marks"),
        Path: ("a path", "give one file or folder"),
    }[kind]
    raise invalid(where, value, allowed, remedy)
