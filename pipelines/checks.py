"""Validation of frozen dataclasses, declared at their fields."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import Field, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pipelines.runtime import empty_path, invalid

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


def ruled(rule: Rule, default: Any) -> Any:
    """A dataclass field with a default and a rule, for `check_fields`."""
    return field(default=default, metadata={RULE: rule})


def positive(default: Any) -> Any:
    """A field that is a finite number above 0."""
    return ruled(Rule(lambda x: math.isfinite(x) and x > 0, "a number above 0", "give a positive value"), default)


def at_least_zero(default: Any) -> Any:
    """A field that is a finite number, 0 or more."""
    return ruled(Rule(lambda x: math.isfinite(x) and x >= 0, "0 or more", "give a value that is not negative"), default)


def at_least(least: int, default: Any, remedy: str = "give a larger number") -> Any:
    """A field that is at least `least`."""
    return ruled(Rule(lambda x: x >= least, f"at least {least}", remedy), default)


def fraction(default: Any) -> Any:
    """A field in [0, 1]."""
    return ruled(Rule(lambda x: 0.0 <= x <= 1.0, "between 0 and 1", "give a fraction"), default)


def check_fields(owner: Any, *, with_class: bool = True) -> None:
    """Check every field of a dataclass against its rule, `Literal` fields against their choices, paths for emptiness.

    Raises:
        InputError: the first field that breaks its rule, named `CLASS.FIELD`, or `FIELD` without `with_class`.
    """
    kind: type = type(owner)
    prefix = f"{kind.__name__}." if with_class else ""
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
