"""Kernels of crop, resize and flip: bicubic, antialiased, in the integer arithmetic of torch's uint8 resize on x86.

ATen's upsample_bicubic2d_aa on uint8 (after Pillow) computes the weights of an axis in float64, scales them so that the
largest just fits 16 bits, and sums integer products: first along the columns, rounded to uint8, then along the rows.
The same sums here give the same bytes.
"""

from __future__ import annotations

import triton.language as tl

from pipelines.views.fused.columns import (
    BOUNDS,
    BYTES,
    COLUMN_TAPS,
    COLUMN_WEIGHTS,
    CROP,
    CUTOUT,
    HEIGHT,
    JITTER,
    ORDER,
    ORIENTATION,
    ROW_TAPS,
    ROW_WEIGHTS,
    ROWS,
    SIZE,
    STRIDE,
    WIDTH,
    WIDTH_OF_TABLE,
)
from pipelines.views.reference.cutout import cutout_device
from pipelines.views.reference.device import jit
from pipelines.views.reference.grayscale import luma_device
from pipelines.views.reference.jitter import jitter_device
from pipelines.views.reference.normalize import to_float_device


@jit
def _cubic(x: tl.tensor) -> tl.tensor:
    """The cubic kernel with a = -0.5 at the distance |x|."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@jit
def _span(at: tl.tensor, scale: tl.tensor, length: tl.tensor) -> tl.tensor:
    """Center of output pixels in source pixels, the first source pixel in reach, and how many are."""
    center = (at.to(tl.float64) + 0.5) * scale
    support = 2.0 * tl.maximum(scale, 1.0)
    first = tl.maximum((center - support + 0.5).to(tl.int64), 0)
    count = tl.minimum((center + support + 0.5).to(tl.int64), length) - first
    return center, first, count


@jit
def _tap(tap: tl.tensor, first: tl.tensor, count: tl.tensor, center: tl.tensor, shrink: tl.tensor) -> tl.tensor:
    """Weight, not yet normalised, of source pixel `first + tap` in the pixels around `center`."""
    weight = _cubic((tap + first - center + 0.5) * shrink)
    return tl.where(tap < count, weight, 0.0)


@jit
def weights_kernel(
    numbers: tl.tensor, weights: tl.tensor, bounds: tl.tensor, precisions: tl.tensor, block: tl.constexpr
) -> None:
    """Weights int16 [taps, S] of an axis of a job, first source pixel and count int32 [S, 2], and the weights' bits.

    Program (job, axis): axis 0 makes the columns, axis 1 the rows.
    """
    job = tl.program_id(0).to(tl.int64)
    axis = tl.program_id(1)
    row = numbers + job * WIDTH_OF_TABLE
    size = tl.load(row + SIZE).to(tl.int32)
    if axis == 0:
        length = tl.load(row + WIDTH)
        taps = tl.load(row + COLUMN_TAPS).to(tl.int32)
        weights += tl.load(row + COLUMN_WEIGHTS)
        bounds += tl.load(row + BOUNDS)
    else:
        length = tl.load(row + HEIGHT)
        taps = tl.load(row + ROW_TAPS).to(tl.int32)
        weights += tl.load(row + ROW_WEIGHTS)
        bounds += tl.load(row + BOUNDS) + 2 * size
    scale = length.to(tl.float64) / size.to(tl.float64)
    shrink = 1.0 / tl.maximum(scale, 1.0)
    largest = tl.zeros((block,), tl.float64)
    for begin in range(0, size, block):
        at = begin + tl.arange(0, block)
        center, first, count = _span(at, scale, length)
        tl.store(bounds + 2 * at, first.to(tl.int32), mask=at < size)
        tl.store(bounds + 2 * at + 1, count.to(tl.int32), mask=at < size)
        total = tl.zeros((block,), tl.float64)
        peak = tl.zeros((block,), tl.float64)
        for tap in range(taps):
            weight = _tap(tap, first, count, center, shrink)
            total += weight
            peak = tl.maximum(peak, weight)
        largest = tl.maximum(largest, tl.where(at < size, peak, 0.0) / tl.where(at < size, total, 1.0))
    top = tl.max(largest, axis=0)
    precision = 0
    unit = 1.0
    for _ in range(22):  # the most bits with which the largest weight stays below 2**15
        fits = (0.5 + top * unit * 2.0).to(tl.int32) < 32768
        precision += fits.to(tl.int32)
        unit = tl.where(fits, unit * 2.0, unit)
    tl.store(precisions + 2 * job + axis, precision)
    for begin in range(0, size, block):
        at = begin + tl.arange(0, block)
        center, first, count = _span(at, scale, length)
        total = tl.zeros((block,), tl.float64)
        for tap in range(taps):
            total += _tap(tap, first, count, center, shrink)
        total = tl.where(at < size, total, 1.0)
        for tap in range(taps):
            weight = _tap(tap, first, count, center, shrink) / total * unit
            rounded = tl.where(weight < 0.0, weight - 0.5, weight + 0.5).to(tl.int32)  # half away from 0
            tl.store(weights + tap * size + at, rounded.to(tl.int16), mask=at < size)


@jit
def _round(total: tl.tensor, precision: tl.tensor) -> tl.tensor:
    """A sum of weights times bytes as a byte; half a unit is in the sum already."""
    return tl.minimum(tl.maximum(total >> precision, 0), 255)


@jit
def columns_kernel(
    numbers: tl.tensor,
    pixels: tl.tensor,
    weights: tl.tensor,
    bounds: tl.tensor,
    precisions: tl.tensor,
    resized: tl.tensor,
    block_rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Resize along the columns: crops uint8 [height, width, 3] to uint8 [height, S, 3].

    The programs (job, part) of a job share its rows.
    """
    job = tl.program_id(0).to(tl.int64)
    row = numbers + job * WIDTH_OF_TABLE
    height, size = tl.load(row + HEIGHT).to(tl.int32), tl.load(row + SIZE).to(tl.int32)
    taps, stride = tl.load(row + COLUMN_TAPS).to(tl.int32), tl.load(row + STRIDE)
    pixels += tl.load(row + CROP)
    weights += tl.load(row + COLUMN_WEIGHTS)
    bounds += tl.load(row + BOUNDS)
    resized += tl.load(row + ROWS)
    precision = tl.load(precisions + 2 * job)
    for top in range(tl.program_id(1) * block_rows, height, tl.num_programs(1) * block_rows):
        y = top + tl.arange(0, block_rows)[:, None]  # [R, 1]
        for begin in range(0, size, block):
            x = begin + tl.arange(0, block)[None, :]  # [1, C]
            first = tl.load(bounds + 2 * x, mask=x < size, other=0)
            count = tl.load(bounds + 2 * x + 1, mask=x < size, other=0)
            half = tl.zeros((block_rows, block), tl.int32) + (1 << (precision - 1))
            red, green, blue = half, half, half
            source = pixels + y.to(tl.int64) * stride + first * 3  # [R, C]
            for tap in range(taps):
                weight = tl.load(weights + tap * size + x, mask=x < size, other=0).to(tl.int32)
                inside = (y < height) & (tap < count)
                red += weight * tl.load(source + tap * 3, mask=inside, other=0).to(tl.int32)
                green += weight * tl.load(source + tap * 3 + 1, mask=inside, other=0).to(tl.int32)
                blue += weight * tl.load(source + tap * 3 + 2, mask=inside, other=0).to(tl.int32)
            out = resized + (y.to(tl.int64) * size + x) * 3
            inside = (y < height) & (x < size)
            tl.store(out, _round(red, precision).to(tl.uint8), mask=inside)
            tl.store(out + 1, _round(green, precision).to(tl.uint8), mask=inside)
            tl.store(out + 2, _round(blue, precision).to(tl.uint8), mask=inside)


@jit
def rows_device(
    row: tl.tensor,
    job: tl.tensor,
    resized: tl.tensor,
    weights: tl.tensor,
    bounds: tl.tensor,
    precisions: tl.tensor,
    size: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    inside: tl.tensor,
    block: tl.constexpr,
) -> tl.tensor:
    """Red, green and blue of pixels at rows y and columns x of a job, resized along the rows."""
    taps = tl.load(row + ROW_TAPS).to(tl.int32)
    weights += tl.load(row + ROW_WEIGHTS)
    bounds += tl.load(row + BOUNDS) + 2 * size
    precision = tl.load(precisions + 2 * job + 1)
    first = tl.load(bounds + 2 * y, mask=inside, other=0)
    count = tl.load(bounds + 2 * y + 1, mask=inside, other=0)
    half = tl.zeros((block,), tl.int32) + (1 << (precision - 1))
    red, green, blue = half, half, half
    source = resized + tl.load(row + ROWS) + (first.to(tl.int64) * size + x) * 3
    for tap in range(taps):
        wanted = inside & (tap < count)
        weight = tl.load(weights + tap * size + y, mask=wanted, other=0).to(tl.int32)
        red += weight * tl.load(source + tap * size * 3, mask=wanted, other=0).to(tl.int32)
        green += weight * tl.load(source + tap * size * 3 + 1, mask=wanted, other=0).to(tl.int32)
        blue += weight * tl.load(source + tap * size * 3 + 2, mask=wanted, other=0).to(tl.int32)
    return _round(red, precision), _round(green, precision), _round(blue, precision)


@jit
def add_brightness(
    row: tl.tensor,
    job: tl.tensor,
    reals: tl.tensor,
    reals_width: tl.tensor,
    sums: tl.tensor,
    red: tl.tensor,
    green: tl.tensor,
    blue: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    inside: tl.tensor,
) -> None:
    """Add the brightness before contrast of bytes at rows y and columns x of a job's view, if it has a contrast."""
    jitter = tl.load(row + JITTER)
    if (jitter >> 1) & 1 != 0:
        r, g, b = to_float_device(red), to_float_device(green), to_float_device(blue)
        top, left = tl.load(row + CUTOUT), tl.load(row + CUTOUT + 1)
        tall, wide = tl.load(row + CUTOUT + 2), tl.load(row + CUTOUT + 3)
        r, g, b = cutout_device(r, g, b, y, x, top, left, tall, wide)
        r, g, b = jitter_device(r, g, b, jitter, row + ORDER, reals + job * reals_width, 0.0, True)
        grid = luma_device(r, g, b) * 16777216.0
        whole = tl.floor(grid)
        rest = grid - whole
        units = whole.to(tl.int64)
        units += ((rest > 0.5) | ((rest == 0.5) & (units % 2 == 1))).to(tl.int64)  # half to even
        tl.atomic_add(sums + job, tl.sum(tl.where(inside, units, 0), axis=0))


@jit
def rows_kernel(
    numbers: tl.tensor,
    reals: tl.tensor,
    reals_width: tl.tensor,
    resized: tl.tensor,
    weights: tl.tensor,
    bounds: tl.tensor,
    precisions: tl.tensor,
    views: tl.tensor,
    sums: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Resize along the rows and mirror: uint8 [height, S, 3] to uint8 [S, S, 3]; accumulate the mean for contrast.

    `sums` int64 [J] receives the total brightness before contrast in units of 2**-24: integers, so that the order of
    programs does not matter. Program (job, part of the view).
    """
    job = tl.program_id(0).to(tl.int64)
    row = numbers + job * WIDTH_OF_TABLE
    size = tl.load(row + SIZE).to(tl.int32)
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    inside = pixel < size * size
    if tl.program_id(1) * block < size * size:
        y, x = pixel // size, pixel % size
        red, green, blue = rows_device(row, job, resized, weights, bounds, precisions, size, y, x, inside, block)
        if tl.load(row + ORIENTATION) != 0:
            x = size - 1 - x
        out = views + tl.load(row + BYTES) + (y * size + x) * 3
        tl.store(out, red.to(tl.uint8), mask=inside)
        tl.store(out + 1, green.to(tl.uint8), mask=inside)
        tl.store(out + 2, blue.to(tl.uint8), mask=inside)
        add_brightness(row, job, reals, reals_width, sums, red, green, blue, y, x, inside)
