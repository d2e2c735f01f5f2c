"""The range of values that becomes 0 to 255 in images of more than 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.runtime import invalid

_BITS = (8, 10, 12, 14, 16)
_NARROW = (1 << 14) - 1  # 16-bit values up to here use fewer bits, and their high byte is nearly black


@dataclass(frozen=True, kw_only=True)
class ValueRange:
    """Values that become 0 and 255; those in between are scaled, those outside are clamped.

    Attributes:
        low, high: finite, low below high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise _wrong(str(self))

    def __str__(self) -> str:
        """As `parse_value_range` reads it: "0..4095"."""
        return f"{_plain(self.low)}..{_plain(self.high)}"

    def option(self) -> str:
        """As it is written on the command line."""
        return f"--value-range{'=' if self.low < 0 else ' '}{self}"

    def scaled(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Values of any shape and type as uint8; integers of 2**b values keep their highest 8 bits."""
        whole = values.dtype.kind in "iu" and float(self.low).is_integer() and float(self.high).is_integer()
        if whole and self.low == 0 and self.high == 0xFFFF and values.dtype == np.uint16:
            high: NDArray[np.uint8] = (values >> np.uint16(8)).astype(np.uint8)
            return high
        inside = np.nan_to_num(values.astype(np.float64), nan=self.low).clip(self.low, self.high)
        scaled = (inside - self.low) * (256 / (self.high - self.low + (1 if whole else 0)))
        found: NDArray[np.uint8] = np.floor(scaled).clip(0, 255).astype(np.uint8)
        return found


FULL = ValueRange(low=0, high=0xFFFF)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Smallest and largest value of an image of more than 8 bits; NaN does not count.

    Attributes:
        low, high: the values.
        kind: "16-bit", "32-bit" or "floating-point".
    """

    low: float
    high: float
    kind: str

    @classmethod
    def of(cls, values: NDArray[Any]) -> Measured:
        """Measure values of any shape."""
        if values.dtype.kind == "f":
            finite = values[np.isfinite(values)]
            if not finite.size:
                return cls(low=0, high=0, kind="floating-point")
            return cls(low=float(finite.min()), high=float(finite.max()), kind="floating-point")
        return cls(low=int(values.min()), high=int(values.max()), kind="16-bit" if values.itemsize == 2 else "32-bit")

    @property
    def is_black(self) -> bool:
        """Whether every value is 0, which is black in any range from 0."""
        return self.low == self.high == 0

    @property
    def fits_16_bits(self) -> bool:
        """Whether the values are integers from 0 to 65535."""
        return self.kind != "floating-point" and self.low >= 0 and self.high <= 0xFFFF

    @property
    def uses_16_bits(self) -> bool:
        """Whether the values are those of a 16-bit image that uses its bits, so that the range needs no statement."""
        return self.fits_16_bits and self.high > _NARROW

    def suggestion(self) -> ValueRange:
        """The range that is likely meant: the fewest usual bits that hold the values, else 0..1, else the values."""
        if self.fits_16_bits:
            return bits_for(self.high)
        if self.low >= 0 and self.high <= 1:
            return ValueRange(low=0, high=1)
        return ValueRange(low=self.low, high=self.high if self.high > self.low else self.low + 1)

    def problem(self) -> str:
        """Why these values cannot be shown without a stated range; "" if they can."""
        if self.uses_16_bits or self.is_black:
            return ""
        option = self.suggestion().option()
        if not self.fits_16_bits:
            values = f"from {_plain(self.low)} to {_plain(self.high)}"
            return f"its {self.kind} values {values} have no defined range: state it, for example {option}"
        return (
            f"its values in 16 bits reach only {_plain(self.high)} and would be nearly black: state their range, for "
            f"example {option}"
        )


def bits_for(largest: float) -> ValueRange:
    """0 to the largest value of 8, 10, 12, 14 or 16 bits, the fewest that hold `largest`."""
    bits = next((bits for bits in _BITS if largest < 1 << bits), _BITS[-1])
    return ValueRange(low=0, high=(1 << bits) - 1)


def parse_value_range(text: str) -> ValueRange:
    """The range in a text such as "0..4095", "-1024..3071" or "0..1.5"; raises InputError."""
    low, dots, high = text.partition("..")
    try:
        low_value, high_value = float(low), float(high)
    except ValueError:
        raise _wrong(text) from None
    if not dots or not (math.isfinite(low_value) and math.isfinite(high_value) and low_value < high_value):
        raise _wrong(text)
    return ValueRange(low=low_value, high=high_value)


def _wrong(text: str) -> Exception:
    return invalid(
        "value_range", text, "MIN..MAX with numbers, MIN below MAX", "write for example 0..4095 for values of 12 bits"
    )


def _plain(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"
