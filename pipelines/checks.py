"""Validation of frozen dataclasses, declared at their fields, and of the arguments of public functions."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import os
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from pipelines.runtime import InputError, empty_path, invalid, shown

RULE = "rule"
"""Key of a field's rule in its metadata."""


class Rule(NamedTuple):
    """What a field's value must be; None is always accepted.

    Attributes:
        holds: whether a value is allowed.
        allowed: continues "must be" in the error.
        remedy: an imperative for the error.
    """

    holds: Callable[[Any], bool]
    allowed: str
    remedy: str


def whole(name: str, value: object) -> int:
    """A whole number as an int.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise _wrong_type(name, value, int)
    return int(value)


def ruled(rule: Rule, default: Any) -> Any:
    """A dataclass field with a default and a rule, for `check_fields`."""
    return field(default=default, metadata={RULE: rule})


def positive(default: Any) -> Any:
    """A field that is a finite number above 0."""
    return ruled(Rule(lambda x: is_finite(x) and x > 0, "a number above 0", "give a positive value"), default)


def at_least_zero(default: Any) -> Any:
    """A field that is a finite number, 0 or more."""
    return ruled(Rule(lambda x: is_finite(x) and x >= 0, "0 or more", "give a value that is not negative"), default)


def at_least(least: int, default: Any, remedy: str = "give a larger number") -> Any:
    """A field that is at least `least`."""
    return ruled(Rule(lambda x: x >= least, f"at least {least}", remedy), default)


def between(least: int, most: int, default: Any, remedy: str = "give a number in that range") -> Any:
    """A field that is a whole number from `least` to `most`, above which no real use is."""
    return ruled(Rule(lambda x: least <= x <= most, f"at least {least} and at most {most:,}", remedy), default)


def fraction(default: Any) -> Any:
    """A field in [0, 1]."""
    return ruled(Rule(lambda x: 0.0 <= x <= 1.0, "between 0 and 1", "give a fraction"), default)


def is_finite(number: float) -> bool:
    """Whether a number is finite and fits into a float, which whole numbers need not."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def check_fields(owner: Any, *, with_class: bool = True, prefix: str | None = None) -> None:
    """Check every field of a dataclass: its type, its rule, the choices of a `Literal`, and that no path is empty.

    Raises:
        InputError: the first field that breaks its rule, named `CLASS.FIELD`, or `FIELD` without `with_class`, or with
            this prefix.
    """
    kind: type = type(owner)
    if prefix is None:
        prefix = f"{kind.__name__}." if with_class else ""
    check_types(owner, prefix)
    for own in fields(owner):
        value, rule = getattr(owner, own.name), _rule(kind, own)
        if isinstance(value, str) and not value.strip() and own.name in _paths(kind):
            raise empty_path(f"{prefix}{own.name}")
        if rule is not None and value is not None and not rule.holds(value):
            raise invalid(f"{prefix}{own.name}", value, rule.allowed, rule.remedy)


def _rule(kind: type, own: Field[Any]) -> Rule | None:
    return own.metadata.get(RULE) or _choices(kind).get(own.name)


@cache
def _paths(kind: type) -> frozenset[str]:
    """Names of the fields that are paths."""
    hints = get_type_hints(kind)
    return frozenset(name for name, hint in hints.items() if hint is Path or Path in get_args(hint))


@cache
def _choices(kind: type) -> dict[str, Rule]:
    """Rules of the fields with a `Literal` type."""
    rules = {}
    for name, hint in get_type_hints(kind).items():
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            allowed = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
            rules[name] = Rule(choices.__contains__, allowed, "choose one of these")
    return rules


def check_types(owner: Any, prefix: str, *, tuples: bool = True) -> None:
    """Check every field of a dataclass (without `tuples`: those that hold one value) against its type hint.

    Raises:
        InputError: the first field of another type, named with `prefix`.
    """
    kind: Any = type(owner)
    for name, hint in _hints(kind).items():
        value = getattr(owner, name)
        is_tuple = any(get_origin(one) is tuple for one in (hint, *get_args(hint)))
        if not _fits(hint, value) and (tuples or not is_tuple):
            raise _wrong_type(f"{prefix}{name}", value, hint)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def typed(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a public function so that wrong arguments raise an InputError that names them, and no TypeError."""
    signature, name = inspect.signature(function), function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = next((key for key in kwargs if key not in signature.parameters), "")
            near = difflib.get_close_matches(unknown, signature.parameters, n=1)
            remedy = f"did you mean {near[0]}" if near else f"call it as {name}{_call(signature)}"
            raise InputError(f"{name} cannot be called in this way ({error}): {remedy}.") from None
        hints = _hints(function)
        for argument, value in bound.arguments.items():
            if argument in hints and not _fits(hints[argument], value):
                raise _wrong_type(argument, value, hints[argument])
        return function(*args, **kwargs)

    return checked


def _call(signature: inspect.Signature) -> str:
    """The arguments that a call must or may have."""
    shown = [
        f"{parameter.name}=..." if parameter.kind is parameter.KEYWORD_ONLY else parameter.name
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    return f"({', '.join(shown)})"


@cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value has a type; True for hints that are not known here. An int is a float, a bool is neither."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(one, value) for one in arguments)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if arguments[-1] is Ellipsis:
            return all(_fits(arguments[0], item) for item in value)
        return len(value) == len(arguments) and all(map(_fits, arguments, value))
    if origin is Sequence:  # numpy's arrays count too
        if isinstance(value, str) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
            return False
        return not is_dataclass(arguments[0]) or all(_fits(arguments[0], item) for item in value)
    if origin is dict:
        return isinstance(value, Mapping)
    if hint is int or hint is float:
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, (str, os.PathLike))
    is_class = isinstance(hint, type) and hint is not Any and not getattr(hint, "_is_protocol", False)
    return not is_class or isinstance(value, hint)


def brief(value: object) -> str:
    """A value in few characters."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a number of more than 4,300 digits
        return shown(value)


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", Path: "a path"}


def _words(hint: Any) -> str:
    """Continues "must be"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(one) for one in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a tuple of {len(arguments)}"
    if origin is Sequence or origin is tuple:
        kind = getattr(arguments[0], "__name__", "")
        return f"a list of {kind}s" if kind[:1].isupper() else "a list"
    if hint is type(None):
        return "None"
    if origin is dict:
        return "a table"
    name = getattr(hint, "__name__", str(hint))
    return _WORDS.get(hint) or (f"a {name}" if is_dataclass(hint) else f"a {getattr(hint, '__module__', '')}.{name}")


def _wrong_type(field: str, value: object, hint: Any) -> InputError:
    return InputError(f"{field} is {brief(value)} but must be {_words(hint)}: give a value of that kind.", field=field)
