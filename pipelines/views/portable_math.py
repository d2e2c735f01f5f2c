"""Exponential, logarithm, cosine and sine with the same bits on every platform.

libm and vectorised versions may differ in the last bit between machines, and even between the body and the tail of one
tensor. These use only IEEE additions and multiplications, and decimal arithmetic in software.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal

import torch
from torch import Tensor

_DECIMAL = Context(prec=40)
_LN2 = _DECIMAL.ln(Decimal(2))
_LN2_HIGH = math.ldexp(round(math.ldexp(float(_LN2), 32)), -32)  # 32 bits, so that its multiples are exact
_LN2_LOW = float(_LN2 - Decimal(_LN2_HIGH))
_RADIANS = math.pi / 180
_SINE = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9, -1, -1))  # |x| <= pi / 4 leaves 2e-22
_COSINE = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9, -1, -1))
_TAYLOR = tuple(1.0 / math.factorial(k) for k in range(13, -1, -1))  # |r| <= ln(2) / 2 leaves 2e-18


def exp(x: Tensor) -> Tensor:
    """e**x to 1e-15, relative.

    Args:
        x: float64 [...], at most 700; values below -700 give exp(-700).

    Returns:
        float64 [...].
    """
    x = x.clamp(min=-700.0)
    k = torch.round(x * 1.4426950408889634)  # x = k ln 2 + r
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    result = torch.full_like(r, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        result = result * r + coefficient
    power = ((k.to(torch.int64) + 1023) << 52).view(torch.float64)  # 2**k, written into the exponent bits
    return result * power


def log(x: float) -> float:
    """Natural logarithm, correctly rounded."""
    return float(_DECIMAL.ln(Decimal(x)))


def cosine_and_sine(degrees: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine to 1e-15 of angles float64 [...] in degrees, at most 1e6; multiples of 90 are exact."""
    quarters = torch.round(degrees / 90.0)
    x = (degrees - quarters * 90.0) * _RADIANS  # [-pi / 4, pi / 4]
    square = x * x
    sine, cosine = torch.full_like(x, _SINE[0]), torch.full_like(x, _COSINE[0])
    for of_sine, of_cosine in zip(_SINE[1:], _COSINE[1:], strict=True):
        sine = sine * square + of_sine
        cosine = cosine * square + of_cosine
    sine = sine * x
    quarter = torch.remainder(quarters, 4.0)
    swapped = torch.remainder(quarter, 2.0) == 1
    along = torch.where(swapped, sine, cosine)
    across = torch.where(swapped, cosine, sine)
    return torch.where((quarter == 1) | (quarter == 2), -along, along), torch.where(quarter >= 2, -across, across)
