"""Measured numbers as a reader sees them: three digits that count, and the spread."""

from __future__ import annotations

import math
from collections.abc import Mapping

DIGITS = 3


def significant(value: float) -> str:
    """A number with three digits that count and commas between thousands: 1,740, 34.1 and 0.735."""
    if not math.isfinite(value):
        return str(value)
    exponent = 0 if value == 0 else int(f"{value:.{DIGITS - 1}e}".partition("e")[2])  # of the rounded number
    decimals = DIGITS - 1 - exponent
    return f"{round(value, decimals):,.{max(0, decimals)}f}" if value else "0"


def with_spread(value: float, spread: Mapping[str, float]) -> str:
    """A median and, if it is of several turns, the smallest and the largest: 348 (271-369), with an en dash."""
    if spread["n"] < 2:
        return significant(value)
    return f"{significant(value)} ({significant(spread['min'])}\N{EN DASH}{significant(spread['max'])})"


def percent(share: float) -> str:
    """A share in [0, 1] in percent with one decimal."""
    return f"{100 * share:.1f} %"


def scientific(value: float) -> str:
    """A small number with one digit that counts: 6e-6."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digit, _, exponent = f"{value:.0e}".partition("e")
    return f"{digit}e{int(exponent)}"
