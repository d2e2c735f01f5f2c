"""Kernels of the separable Gaussian blur with a reflected border."""

from __future__ import annotations

import triton.language as tl

from pipelines.views.fused.color import finish
from pipelines.views.fused.columns import (
    BLUR_TAPS,
    BLURRED,
    OUT,
    REACH,
    SIZE,
    SOLARIZE,
    THRESHOLD,
    WIDTH_OF_TABLE,
)
from pipelines.views.reference.device import jit


@jit
def _reflect(at: tl.tensor, size: tl.tensor) -> tl.tensor:
    """A position up to `size - 1` beyond the border, mirrored at the border's pixel."""
    at = tl.abs(at)
    return tl.where(at > size - 1, 2 * (size - 1) - at, at)


@jit
def _across(
    plane: tl.tensor,
    at: tl.tensor,
    step: tl.tensor,
    offset: tl.tensor,
    taps: tl.tensor,
    reach: tl.tensor,
    size: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """Weighted sum around position `at` of lines with `step` values from one position to the next."""
    total = tl.load(plane + offset + at * step, mask=inside, other=0.0) * tl.load(taps)
    for tap in range(1, reach + 1):
        before = tl.load(plane + offset + _reflect(at - tap, size) * step, mask=inside, other=0.0)
        behind = tl.load(plane + offset + _reflect(at + tap, size) * step, mask=inside, other=0.0)
        total += (before + behind) * tl.load(taps + tap)
    return total


@jit
def down_kernel(
    numbers: tl.tensor,
    reals: tl.tensor,
    reals_width: tl.tensor,
    jobs: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Blur along the rows' direction: float32 [3, S, S] to the same. Program (blurred job, part of the planes)."""
    job = tl.load(jobs + tl.program_id(0))
    row = numbers + job * WIDTH_OF_TABLE
    size = tl.load(row + SIZE).to(tl.int32)
    value = tl.program_id(1) * block + tl.arange(0, block)
    inside = value < 3 * size * size
    if tl.program_id(1) * block < 3 * size * size:
        y = value // size % size
        start = tl.load(row + BLURRED)
        taps = reals + job * reals_width + BLUR_TAPS
        total = _across(
            source + start, y, size, value - y * size, taps, tl.load(row + REACH).to(tl.int32), size, inside
        )
        tl.store(target + start + value, total, mask=inside)


@jit
def along_kernel(
    numbers: tl.tensor,
    reals: tl.tensor,
    reals_width: tl.tensor,
    jobs: tl.tensor,
    source: tl.tensor,
    out: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Blur along the columns' direction and finish: float32 [3, S, S] to views [S, S, 3]. Program (job, part)."""
    job = tl.load(jobs + tl.program_id(0))
    row = numbers + job * WIDTH_OF_TABLE
    real = reals + job * reals_width
    size = tl.load(row + SIZE).to(tl.int32)
    area = size * size
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    inside = pixel < area
    if tl.program_id(1) * block < area:
        x = pixel % size
        line = pixel - x
        plane = source + tl.load(row + BLURRED)
        taps = real + BLUR_TAPS
        reach = tl.load(row + REACH).to(tl.int32)
        red = _across(plane, x, 1, line, taps, reach, size, inside)
        green = _across(plane + area, x, 1, line, taps, reach, size, inside)
        blue = _across(plane + 2 * area, x, 1, line, taps, reach, size, inside)
        threshold = tl.load(real + THRESHOLD)
        place = out + tl.load(row + OUT) + pixel * 3
        finish(red, green, blue, tl.load(row + SOLARIZE), threshold, place, inside)
