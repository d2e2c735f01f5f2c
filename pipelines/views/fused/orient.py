"""Kernels of flips, quarter turns and rotation, launched only for batches that have any but a horizontal flip.

The same bits as `pipelines.views.reference.orient`, which says what is fused and what is not.
"""

from __future__ import annotations

import triton.language as tl

from pipelines.views.fused.columns import (
    BYTES,
    COSINE,
    FILL,
    IS_BILINEAR,
    IS_FILLED,
    ORIENTATION,
    ROTATED,
    SINE,
    SIZE,
    WIDTH_OF_ROTATIONS,
    WIDTH_OF_TABLE,
)
from pipelines.views.fused.resize import add_brightness, rows_device
from pipelines.views.reference.device import jit


@jit
def turned_rows_kernel(
    numbers: tl.tensor,
    reals: tl.tensor,
    reals_width: tl.tensor,
    resized: tl.tensor,
    weights: tl.tensor,
    bounds: tl.tensor,
    precisions: tl.tensor,
    views: tl.tensor,
    sums: tl.tensor,
    level: tl.tensor,
    block: tl.constexpr,
) -> None:
    """As `rows_kernel`, in any of eight orientations; jobs that are rotated go to `level`, laid out as `views`."""
    job = tl.program_id(0).to(tl.int64)
    row = numbers + job * WIDTH_OF_TABLE
    size = tl.load(row + SIZE).to(tl.int32)
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    inside = pixel < size * size
    if tl.program_id(1) * block < size * size:
        y, x = pixel // size, pixel % size
        red, green, blue = rows_device(row, job, resized, weights, bounds, precisions, size, y, x, inside, block)
        orientation = tl.load(row + ORIENTATION).to(tl.int32)
        transposed = (orientation & 4) != 0
        y, x = tl.where(transposed, x, y), tl.where(transposed, y, x)
        x = tl.where((orientation & 1) != 0, size - 1 - x, x)
        y = tl.where((orientation & 2) != 0, size - 1 - y, y)
        rotated = (orientation & ROTATED) != 0
        out = views + tl.load(row + BYTES) + (y * size + x) * 3
        if rotated:
            out = level + tl.load(row + BYTES) + (y * size + x) * 3
        tl.store(out, red.to(tl.uint8), mask=inside)
        tl.store(out + 1, green.to(tl.uint8), mask=inside)
        tl.store(out + 2, blue.to(tl.uint8), mask=inside)
        if not rotated:
            add_brightness(row, job, reals, reals_width, sums, red, green, blue, y, x, inside)


@jit
def rotate_kernel(
    numbers: tl.tensor,
    reals: tl.tensor,
    reals_width: tl.tensor,
    jobs: tl.tensor,
    rotations: tl.tensor,
    level: tl.tensor,
    views: tl.tensor,
    sums: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Rotate views uint8 [S, S, 3] to the same; accumulate the mean for contrast. Program (rotated job, part)."""
    job = tl.load(jobs + tl.program_id(0))
    row = numbers + job * WIDTH_OF_TABLE
    rotation = rotations + tl.program_id(0) * WIDTH_OF_ROTATIONS
    size = tl.load(row + SIZE).to(tl.int32)
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    inside = pixel < size * size
    if tl.program_id(1) * block < size * size:
        y, x = pixel // size, pixel % size
        cosine, sine = tl.load(rotation + COSINE), tl.load(rotation + SINE)
        middle = (size - 1).to(tl.float32) * 0.5
        across, along = x.to(tl.float32) - middle, y.to(tl.float32) - middle
        column = _position(across * cosine - along * sine, size)
        line = _position(across * sine + along * cosine, size)
        source = level + tl.load(row + BYTES)
        if tl.load(rotation + IS_BILINEAR) != 0.0:
            red, green, blue = _bilinear(source, line, column, size, rotation, inside)
        else:
            red, green, blue = _nearest(source, line, column, size, rotation, inside)
        red, green, blue = _to_even(red), _to_even(green), _to_even(blue)
        out = views + tl.load(row + BYTES) + pixel * 3
        tl.store(out, red.to(tl.uint8), mask=inside)
        tl.store(out + 1, green.to(tl.uint8), mask=inside)
        tl.store(out + 2, blue.to(tl.uint8), mask=inside)
        add_brightness(row, job, reals, reals_width, sums, red, green, blue, y, x, inside)


@jit
def _position(of_grid: tl.tensor, size: tl.tensor) -> tl.tensor:
    """A position in -1 to 1 of the view in pixels."""
    return ((of_grid + 1.0).to(tl.float64) * (size.to(tl.float64) * 0.5) - 0.5).to(tl.float32)


@jit
def _to_even(value: tl.tensor) -> tl.tensor:
    """A byte's value in float32 as a whole number int32, half to even."""
    whole = tl.floor(value)
    rest = value - whole
    number = whole.to(tl.int32)
    return number + ((rest > 0.5) | ((rest == 0.5) & (number % 2 == 1))).to(tl.int32)


@jit
def _pixel(source: tl.tensor, line: tl.tensor, column: tl.tensor, size: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Red, green, blue and 1 of pixels of a view [S, S, 3]; zeros from outside."""
    found = inside & (line >= 0) & (line < size) & (column >= 0) & (column < size)
    at = source + (line * size + column) * 3
    red = tl.load(at, mask=found, other=0).to(tl.float32)
    green = tl.load(at + 1, mask=found, other=0).to(tl.float32)
    blue = tl.load(at + 2, mask=found, other=0).to(tl.float32)
    return red, green, blue, found.to(tl.float32)


@jit
def _nearest(
    source: tl.tensor,
    line: tl.tensor,
    column: tl.tensor,
    size: tl.tensor,
    rotation: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """The nearest pixels, or the fill, which is 0 without one."""
    red, green, blue, there = _pixel(source, _to_even(line), _to_even(column), size, inside)
    red = tl.where(there < 0.5, tl.load(rotation + FILL), red)
    green = tl.where(there < 0.5, tl.load(rotation + FILL + 1), green)
    blue = tl.where(there < 0.5, tl.load(rotation + FILL + 2), blue)
    return red, green, blue


@jit
def _add(
    red: tl.tensor,
    green: tl.tensor,
    blue: tl.tensor,
    there: tl.tensor,
    source: tl.tensor,
    line: tl.tensor,
    column: tl.tensor,
    size: tl.tensor,
    inside: tl.tensor,
    weight: tl.tensor,
) -> tl.tensor:
    """Sums plus weighted pixels, rounded once: the product of two float32 is exact in float64."""
    exact = weight.to(tl.float64)
    r, g, b, one = _pixel(source, line, column, size, inside)
    red = (r.to(tl.float64) * exact + red.to(tl.float64)).to(tl.float32)
    green = (g.to(tl.float64) * exact + green.to(tl.float64)).to(tl.float32)
    blue = (b.to(tl.float64) * exact + blue.to(tl.float64)).to(tl.float32)
    there = (one.to(tl.float64) * exact + there.to(tl.float64)).to(tl.float32)
    return red, green, blue, there


@jit
def _bilinear(
    source: tl.tensor,
    line: tl.tensor,
    column: tl.tensor,
    size: tl.tensor,
    rotation: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """Pixels interpolated between four, blended with the fill where some of them are outside."""
    top, left = tl.floor(line), tl.floor(column)
    below, right = line - top, column - left
    above, before = 1.0 - below, 1.0 - right
    y, x = top.to(tl.int32), left.to(tl.int32)
    weight = above * before
    red, green, blue, there = _pixel(source, y, x, size, inside)
    red, green, blue, there = red * weight, green * weight, blue * weight, there * weight
    red, green, blue, there = _add(red, green, blue, there, source, y, x + 1, size, inside, above * right)
    red, green, blue, there = _add(red, green, blue, there, source, y + 1, x, size, inside, below * before)
    red, green, blue, there = _add(red, green, blue, there, source, y + 1, x + 1, size, inside, below * right)
    if tl.load(rotation + IS_FILLED) != 0.0:
        fill = tl.load(rotation + FILL)
        red = (red - fill) * there + fill
        fill = tl.load(rotation + FILL + 1)
        green = (green - fill) * there + fill
        fill = tl.load(rotation + FILL + 2)
        blue = (blue - fill) * there + fill
    return red, green, blue
