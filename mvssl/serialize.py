"""A recipe as plain JSON values and back; and what differs between two."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from mvssl.recipe import Recipe
from pipelines.errors import InputError

T = TypeVar("T")


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


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in words which fields differ between two plain recipes, e.g. ``epochs: 10 -> 20``."""
    was, now = dict(flatten(old)), dict(flatten(new))
    absent = "(absent)"
    return [
        f"{name}: {was.get(name, absent)!r} -> {now.get(name, absent)!r}"
        for name in dict.fromkeys([*was, *now])
        if was.get(name, absent) != now.get(name, absent)
    ]


def from_dict(plain: Mapping[str, Any]) -> Recipe:
    """The recipe of its plain form; the inverse of `to_dict`.

    Raises:
        InputError: a field is unknown to this version of mvssl, is missing, or holds a value a recipe must not have.
    """
    return _build(Recipe, plain, "recipe")


def _build(kind: type[T], plain: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `kind` from a mapping."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(plain) - set(hints))
    if unknown:
        raise InputError(
            f"{where} has the unknown field {unknown[0]!r} but may only have {', '.join(hints)}: "
            "use the version of mvssl that wrote it, or take the field out."
        )
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in plain.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"{where} is incomplete ({error}): add what is missing.") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """Turn one JSON value into what the type hint says: lists become tuples, mappings become dataclasses."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _value(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _build(typing.cast("type[Any]", hint), value, where)
    if origin is tuple and isinstance(value, list):
        variable = len(arguments) == 2 and arguments[1] is Ellipsis
        kinds = [arguments[0]] * len(value) if variable else list(arguments)
        return tuple(
            _value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=False))
        )
    return value
