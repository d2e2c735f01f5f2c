"""Triton kernels of a training BatchNorm over V views, with residual and ReLU, forward and backward.

A BatchNorm is limited by memory traffic, so each pass over the activations counts: forward, x is read once for the
statistics and once to normalise; backward, x and the gradient are read once for the sums and once for dx. Everything
around the norm (adding two gradients, ReLU and its mask, the residual, a projected shortcut with a norm of its own)
happens in those passes. ReLU's mask is computed again from x, or read from the output where that takes fewer bytes.

All tensors are seen as [rows, C]: channels-last images or plain vectors, the V views one after the other. Each view's
sums are taken by `parts` programs per block of channels and added up in a fixed order by a second kernel.
"""

from __future__ import annotations

import triton.language as tl

from pipelines.views.reference.device import jit

ROWS = tl.constexpr(32)
"""Rows of a tile. 32 rows by 64 channels are 16 values a thread: three float32 sums of them fit without spilling."""
PARTS = tl.constexpr(128)
"""Partial sums that are added at a time, so that the second kernel waits for memory a few times only."""


@jit
def sums_kernel(x, mean, partial, rows, channels, parts, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Partial sums of x - pivot and its square [2, V, parts, C]; the pivot, a view's first row, goes to mean [V, C]."""
    block, part, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = block * size + tl.arange(0, size)
    inside = c < channels
    start = view.to(tl.int64) * rows
    pivot = tl.load(x + start * channels + c, mask=inside, other=0.0).to(tl.float32)
    if part == 0:
        tl.store(mean + view * channels + c, pivot, mask=inside)
    each = tl.cdiv(rows, parts)
    total = tl.zeros((ROWS, size), tl.float32)
    squares = tl.zeros((ROWS, size), tl.float32)
    for row in range(part * each, tl.minimum(part * each + each, rows), ROWS):
        r = row + tl.arange(0, ROWS)
        mask = (r < tl.minimum(part * each + each, rows))[:, None] & inside[None, :]
        at = (start + r)[:, None] * channels + c[None, :]
        value = tl.where(mask, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - pivot[None, :], 0.0)
        total += value
        squares += value * value
    to = (view * parts + part) * channels + c
    tl.store(partial + to, tl.sum(total, axis=0), mask=inside)
    tl.store(partial + tl.num_programs(2) * parts * channels + to, tl.sum(squares, axis=0), mask=inside)


@jit
def _added(partial, which, view, views, parts, channels, c, inside):  # type: ignore[no-untyped-def]
    """The sum over the parts, in a fixed order; partial is [kinds, V, parts, C]."""
    total = tl.zeros((PARTS, c.shape[0]), tl.float32)
    for part in range(0, parts, PARTS):
        p = part + tl.arange(0, PARTS)
        at = ((which * views + view) * parts + p)[:, None] * channels + c[None, :]
        total += tl.load(partial + at, mask=(p < parts)[:, None] & inside[None, :], other=0.0)
    return tl.sum(total, axis=0)


@jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    partial, mean, rstd, running_mean, running_var, tracked,
    rows, channels, parts, views, places, step_views,
    momentum: tl.constexpr, eps: tl.constexpr, track: tl.constexpr, first: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """Mean, which holds the pivots, and 1 / standard deviation [V, C]; moves the running statistics [C]."""
    c = tl.program_id(0) * size + tl.arange(0, size)
    inside = c < channels
    if track:
        new_mean = tl.load(running_mean + c, mask=inside, other=0.0)
        new_var = tl.load(running_var + c, mask=inside, other=0.0)
        keep = 1.0 - momentum
        if first:
            for each in range(step_views):  # noqa: B007
                new_mean *= keep
                new_var *= keep
    for view in range(views):
        pivot = tl.load(mean + view * channels + c, mask=inside, other=0.0)
        away = _added(partial, 0, view, views, parts, channels, c, inside) / rows
        square = _added(partial, 1, view, views, parts, channels, c, inside) / rows
        var = tl.maximum(square - away * away, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(mean + view * channels + c, pivot + away, mask=inside)
        tl.store(rstd + view * channels + c, tl.rsqrt(var + eps), mask=inside)
        if track:
            weight = tl.full((), momentum, tl.float32)
            for later in range(step_views - 1 - ((places >> (5 * view)) & 31)):  # noqa: B007
                weight *= keep
            new_mean += weight * (pivot + away)
            new_var += weight * var * (rows / (rows - 1.0))
    if track:
        tl.store(running_mean + c, new_mean, mask=inside)
        tl.store(running_var + c, new_var, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(tracked, tl.load(tracked) + views)


@jit
def _normalised(x, mean, rstd, weight, bias, at, mask, row, c, inside, affine: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of x normalised, scaled and shifted, in float32; `row` is the first of the view's [C] values."""
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row + c, mask=inside, other=0.0)
    centred = value - tl.load(mean + row + c, mask=inside, other=0.0)[None, :]
    if affine:
        scale *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        return centred * scale[None, :] + tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    return centred * scale[None, :]


@jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x, mean, rstd, weight, bias, other, other_mean, other_rstd, other_weight, other_bias, y, rows, channels,
    affine: tl.constexpr, relu: tl.constexpr, kind: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """One tile of y. `kind`: 0 none, 1 `other` is added, 2 `other` normalised by its own statistics is added."""
    c = tl.program_id(1) * size + tl.arange(0, size)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    view = tl.program_id(2)
    inside = c < channels
    mask = (r < rows)[:, None] & inside[None, :]
    at = (view.to(tl.int64) * rows + r)[:, None] * channels + c[None, :]
    row = view * channels
    value = _normalised(x, mean, rstd, weight, bias, at, mask, row, c, inside, affine)
    if kind == 1:
        value += tl.load(other + at, mask=mask, other=0.0).to(tl.float32)
    if kind == 2:
        value += _normalised(other, other_mean, other_rstd, other_weight, other_bias, at, mask, row, c, inside, affine)
    if relu:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a diverged run must show NaN
    tl.store(y + at, value, mask=mask)


@jit
def pool_kernel(  # type: ignore[no-untyped-def]
    x, mean, rstd, weight, bias, y, taps, rows, channels, height, width, out_height, out_width,
    affine: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """One tile of the 3x3 max-pooling (stride 2, padding 1) of ReLU of the norm, and which of the 9 taps it took."""
    c = tl.program_id(1) * size + tl.arange(0, size)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    view = tl.program_id(2)
    inside = c < channels
    mask = (r < rows)[:, None] & inside[None, :]
    image = (view.to(tl.int64) * rows + r) // (out_height * out_width)
    top = 2 * (r // out_width % out_height) - 1
    left = 2 * (r % out_width) - 1
    best = tl.full((ROWS, size), -1.0, tl.float32)
    taken = tl.zeros((ROWS, size), tl.int8)
    for tap in tl.static_range(9):
        h, w = top + tap // 3, left + tap % 3
        present = mask & ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
        at = ((image * height + h) * width + w)[:, None] * channels + c[None, :]
        value = _normalised(x, mean, rstd, weight, bias, at, present, view * channels, c, inside, affine)
        value = tl.where(
            present,
            tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL).to(y.dtype.element_ty).to(tl.float32),
            -1.0,
        )
        better = (value > best) | (value != value)  # NaN wins, as in torch
        best = tl.where(better, value, best)
        taken = tl.where(better, tap, taken).to(tl.int8)
    at = (view.to(tl.int64) * rows + r)[:, None] * channels + c[None, :]
    tl.store(y + at, best, mask=mask)
    tl.store(taps + at, taken, mask=mask)


@jit
def _unpooled(  # type: ignore[no-untyped-def]
    first, second, taps, r, view, rows, c, mask, channels, height, width, out_height, out_width, two: tl.constexpr
):  # fmt: skip
    """A tile of the gradient before max-pooling: what those of up to four windows send here."""
    image = (view.to(tl.int64) * rows + r) // (height * width)
    h = r // width % height
    w = r % width
    gradient = tl.zeros((r.shape[0], c.shape[0]), tl.float32)
    for corner in tl.static_range(4):
        oh, ow = (h + 1) // 2 - corner // 2, (w + 1) // 2 - corner % 2
        i, j = h - 2 * oh + 1, w - 2 * ow + 1
        covers = (oh >= 0) & (oh < out_height) & (ow >= 0) & (ow < out_width) & (i < 3) & (j < 3)
        there = mask & covers[:, None]
        at = ((image * out_height + oh) * out_width + ow)[:, None] * channels + c[None, :]
        value = tl.load(first + at, mask=there, other=0.0).to(tl.float32)
        if two:
            value += tl.load(second + at, mask=there, other=0.0).to(tl.float32)
        gradient += tl.where(tl.load(taps + at, mask=there, other=-1) == (3 * i + j)[:, None], value, 0.0)
    return gradient


@jit
def _masked_gradient(  # type: ignore[no-untyped-def]
    first, second, x, mean, rstd, weight, bias, y, at, mask, r, view, rows, c, inside, channels,
    height, width, out_height, out_width,
    affine: tl.constexpr, relu: tl.constexpr, kind: tl.constexpr, two: tl.constexpr, pool: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient before ReLU, in float32: the sum of two where there are `two`, 0 where ReLU gave 0.

    With `pool` the gradients are those of the pooled output, and `y` holds the taps that it took.
    """
    row = view * channels
    if pool:
        gradient = _unpooled(
            first, second, y, r, view, rows, c, mask, channels, height, width, out_height, out_width, two
        )
    else:
        gradient = tl.load(first + at, mask=mask, other=0.0).to(tl.float32)
        if two:
            gradient += tl.load(second + at, mask=mask, other=0.0).to(tl.float32)
    if relu:
        if kind == 0:
            value = _normalised(x, mean, rstd, weight, bias, at, mask, row, c, inside, affine)
        else:
            value = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.where(value > 0, gradient, 0.0)
    return gradient


@jit
def gradient_sums_kernel(  # type: ignore[no-untyped-def]
    first, second, x, mean, rstd, weight, bias, y, other, other_mean, masked, partial, rows, channels, parts,
    height, width, out_height, out_width,
    affine: tl.constexpr, relu: tl.constexpr, kind: tl.constexpr, two: tl.constexpr, pool: tl.constexpr,
    size: tl.constexpr,
):  # fmt: skip
    """Partial sums of dy, of dy times x - mean, and with `kind` 2 of dy times other - its mean: [kinds, V, parts, C].

    With a shortcut the gradient before ReLU is also written to `masked`: it is the shortcut's.
    """
    block, part, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = block * size + tl.arange(0, size)
    inside = c < channels
    row = view * channels
    centre = tl.load(mean + row + c, mask=inside, other=0.0)
    if kind == 2:
        other_centre = tl.load(other_mean + row + c, mask=inside, other=0.0)
        other_sum = tl.zeros((ROWS, size), tl.float32)
    each = tl.cdiv(rows, parts)
    total = tl.zeros((ROWS, size), tl.float32)
    product = tl.zeros((ROWS, size), tl.float32)
    for begin in range(part * each, tl.minimum(part * each + each, rows), ROWS):
        r = begin + tl.arange(0, ROWS)
        mask = (r < tl.minimum(part * each + each, rows))[:, None] & inside[None, :]
        at = (view.to(tl.int64) * rows + r)[:, None] * channels + c[None, :]
        dy = _masked_gradient(
            first, second, x, mean, rstd, weight, bias, y, at, mask, r, view, rows, c, inside, channels,
            height, width, out_height, out_width, affine, relu, kind, two, pool,
        )  # fmt: skip
        if kind > 0:
            tl.store(masked + at, dy, mask=mask)
            dy = dy.to(masked.dtype.element_ty).to(tl.float32)
        total += dy
        product += dy * (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - centre[None, :])
        if kind == 2:
            other_sum += dy * (tl.load(other + at, mask=mask, other=0.0).to(tl.float32) - other_centre[None, :])
    to = (view * parts + part) * channels + c
    stride = tl.num_programs(2) * parts * channels
    tl.store(partial + to, tl.sum(total, axis=0), mask=inside)
    tl.store(partial + stride + to, tl.sum(product, axis=0), mask=inside)
    if kind == 2:
        tl.store(partial + 2 * stride + to, tl.sum(other_sum, axis=0), mask=inside)


@jit
def coefficients_kernel(  # type: ignore[no-untyped-def]
    partial, rstd, weight, other_rstd, other_weight, slopes, constants, dweight, dbias, other_dweight,
    rows, channels, parts, views,
    affine: tl.constexpr, kind: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """What dx needs of the sums, and the gradients of weight and bias over all views.

    dx = scale * dy - (x - mean) * slope - constant; slopes and constants are [1 or 2, V, C], the shortcut's second.
    """
    c = tl.program_id(0) * size + tl.arange(0, size)
    inside = c < channels
    all_dy = tl.zeros((size,), tl.float32)
    all_products = tl.zeros((size,), tl.float32)
    other_products = tl.zeros((size,), tl.float32)
    for view in range(views):
        at = view * channels + c
        sum_dy = _added(partial, 0, view, views, parts, channels, c, inside)
        inverse = tl.load(rstd + at, mask=inside, other=0.0)
        product = _added(partial, 1, view, views, parts, channels, c, inside) * inverse
        scale = inverse
        if affine:
            scale *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(slopes + at, scale * inverse * product / rows, mask=inside)
        tl.store(constants + at, scale * sum_dy / rows, mask=inside)
        all_dy += sum_dy
        all_products += product
        if kind == 2:
            behind = views * channels + at
            inverse = tl.load(other_rstd + at, mask=inside, other=0.0)
            product = _added(partial, 2, view, views, parts, channels, c, inside) * inverse
            scale = inverse
            if affine:
                scale *= tl.load(other_weight + c, mask=inside, other=0.0).to(tl.float32)
            tl.store(slopes + behind, scale * inverse * product / rows, mask=inside)
            tl.store(constants + behind, scale * sum_dy / rows, mask=inside)
            other_products += product
    if affine:
        tl.store(dweight + c, all_products, mask=inside)
        tl.store(dbias + c, all_dy, mask=inside)
        if kind == 2:
            tl.store(other_dweight + c, other_products, mask=inside)


@jit
def _dx(dy, x, mean, rstd, weight, slope, constant, at, mask, row, c, inside, affine: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of dx, in float32."""
    scale = tl.load(rstd + row + c, mask=inside, other=0.0)
    if affine:
        scale *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    centred = (
        tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - tl.load(mean + row + c, mask=inside, other=0.0)[None, :]
    )
    steep = tl.load(slope + row + c, mask=inside, other=0.0)
    return dy * scale[None, :] - centred * steep[None, :] - tl.load(constant + row + c, mask=inside, other=0.0)[None, :]


@jit
def backward_kernel(  # type: ignore[no-untyped-def]
    first, second, x, mean, rstd, weight, bias, taps, other, other_mean, other_rstd, other_weight, masked,
    slopes, constants, dx, other_dx, rows, channels, height, width, out_height, out_width,
    affine: tl.constexpr, relu: tl.constexpr, kind: tl.constexpr, two: tl.constexpr, pool: tl.constexpr,
    size: tl.constexpr,
):  # fmt: skip
    """One tile of dx, and with `kind` 2 of the shortcut's."""
    c = tl.program_id(1) * size + tl.arange(0, size)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    view = tl.program_id(2)
    inside = c < channels
    mask = (r < rows)[:, None] & inside[None, :]
    at = (view.to(tl.int64) * rows + r)[:, None] * channels + c[None, :]
    row = view * channels
    if kind > 0:
        dy = tl.load(masked + at, mask=mask, other=0.0).to(tl.float32)
    else:
        dy = _masked_gradient(
            first, second, x, mean, rstd, weight, bias, taps, at, mask, r, view, rows, c, inside, channels,
            height, width, out_height, out_width, affine, relu, kind, two, pool,
        )  # fmt: skip
    tl.store(dx + at, _dx(dy, x, mean, rstd, weight, slopes, constants, at, mask, row, c, inside, affine), mask=mask)
    if kind == 2:
        behind = tl.num_programs(2) * channels
        value = _dx(
            dy, other, other_mean, other_rstd, other_weight, slopes + behind, constants + behind,
            at, mask, row, c, inside, affine,
        )  # fmt: skip
        tl.store(other_dx + at, value, mask=mask)
