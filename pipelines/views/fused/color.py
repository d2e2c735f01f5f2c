"""Kernel of cutout, jitter and grayscale, and of solarize and normalisation for views without blur."""

from __future__ import annotations

import triton.language as tl

from pipelines.views.fused.columns import (
    BLURRED,
    BYTES,
    CUTOUT,
    GRAY,
    JITTER,
    ORDER,
    OUT,
    REACH,
    SIZE,
    SOLARIZE,
    THRESHOLD,
    WIDTH_OF_TABLE,
)
from pipelines.views.reference.cutout import cutout_device
from pipelines.views.reference.device import jit
from pipelines.views.reference.grayscale import grayscale_device
from pipelines.views.reference.jitter import jitter_device
from pipelines.views.reference.normalize import normalize_device, to_float_device
from pipelines.views.reference.solarize import solarize_device


@jit
def finish(
    red: tl.tensor,
    green: tl.tensor,
    blue: tl.tensor,
    solarize: tl.tensor,
    threshold: tl.tensor,
    out: tl.tensor,
    inside: tl.tensor,
) -> None:
    """Solarize, normalise and store pixels at `out`, in the dtype of its values."""
    red = solarize_device(red, solarize, threshold)
    green = solarize_device(green, solarize, threshold)
    blue = solarize_device(blue, solarize, threshold)
    red, green, blue = normalize_device(red, green, blue)
    tl.store(out, red.to(out.dtype.element_ty), mask=inside)
    tl.store(out + 1, green.to(out.dtype.element_ty), mask=inside)
    tl.store(out + 2, blue.to(out.dtype.element_ty), mask=inside)


@jit
def color_kernel(
    numbers: tl.tensor,
    reals: tl.tensor,
    reals_width: tl.tensor,
    views: tl.tensor,
    sums: tl.tensor,
    blurred: tl.tensor,
    out: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Resized views uint8 [S, S, 3] to finished views [S, S, 3], or where they are blurred to float32 [3, S, S].

    Program (job, part of the view).
    """
    job = tl.program_id(0).to(tl.int64)
    row = numbers + job * WIDTH_OF_TABLE
    real = reals + job * reals_width
    size = tl.load(row + SIZE).to(tl.int32)
    area = size * size
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    inside = pixel < area
    if tl.program_id(1) * block < area:
        y, x = pixel // size, pixel % size
        source = views + tl.load(row + BYTES) + pixel * 3
        red = to_float_device(tl.load(source, mask=inside, other=0))
        green = to_float_device(tl.load(source + 1, mask=inside, other=0))
        blue = to_float_device(tl.load(source + 2, mask=inside, other=0))
        top, left = tl.load(row + CUTOUT), tl.load(row + CUTOUT + 1)
        tall, wide = tl.load(row + CUTOUT + 2), tl.load(row + CUTOUT + 3)
        red, green, blue = cutout_device(red, green, blue, y, x, top, left, tall, wide)
        mean = (tl.load(sums + job).to(tl.float64) / (area.to(tl.float64) * 16777216.0)).to(tl.float32)
        red, green, blue = jitter_device(red, green, blue, tl.load(row + JITTER), row + ORDER, real, mean, False)
        red, green, blue = grayscale_device(red, green, blue, tl.load(row + GRAY))
        if tl.load(row + REACH) < 0:
            threshold = tl.load(real + THRESHOLD)
            place = out + tl.load(row + OUT) + pixel * 3
            finish(red, green, blue, tl.load(row + SOLARIZE), threshold, place, inside)
        else:
            plane = blurred + tl.load(row + BLURRED) + pixel
            tl.store(plane, red, mask=inside)
            tl.store(plane + area, green, mask=inside)
            tl.store(plane + 2 * area, blue, mask=inside)
