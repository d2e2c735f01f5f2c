"""Triton kernels of training BatchNorm per view, fused with the residual and ReLU; forward and backward.

BatchNorm is memory-bound, so passes over the activations count. The forward reads x once for the statistics and once to
normalise; the backward reads x and the gradient once for the sums and once for dx. The neighbouring operations (adding
two gradients, ReLU and its mask, the residual, a projected shortcut with its own norm) happen in these passes. ReLU's
mask is recomputed from x, or read from the output where that moves fewer bytes.

All tensors are [rows, C]: channels-last images or vectors, the V views one after another. Reductions have two kernels:
`chunks` programs per view and block of channels write partial sums, a second kernel adds them in a fixed order.
"""

from __future__ import annotations

import triton.language as tl

from pipelines.views.reference.device import jit

ROWS = tl.constexpr(32)
"""Rows of a tile. 32 rows by 64 channels are 16 values per thread: three float32 accumulators fit without spilling."""
CHUNKS = tl.constexpr(128)
"""Partial sums loaded at a time, so that the second kernel waits for memory only a few times."""


@jit
def sums_kernel(x, mean, partial, rows, channels, chunks, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Partial sums of x - pivot and its square, [2, V, chunks, C].

    The pivot, each view's first row, prevents cancellation; it is stored in mean [V, C].
    """
    block, chunk, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = block * size + tl.arange(0, size)
    inside = c < channels
    start = view.to(tl.int64) * rows
    pivot = tl.load(x + start * channels + c, mask=inside, other=0.0).to(tl.float32)
    if chunk == 0:
        tl.store(mean + view * channels + c, pivot, mask=inside)
    chunk_rows = tl.cdiv(rows, chunks)
    total = tl.zeros((ROWS, size), tl.float32)
    squares = tl.zeros((ROWS, size), tl.float32)
    for row in range(chunk * chunk_rows, tl.minimum(chunk * chunk_rows + chunk_rows, rows), ROWS):
        r = row + tl.arange(0, ROWS)
        mask = (r < tl.minimum(chunk * chunk_rows + chunk_rows, rows))[:, None] & inside[None, :]
        at = (start + r)[:, None] * channels + c[None, :]
        value = tl.where(mask, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - pivot[None, :], 0.0)
        total += value
        squares += value * value
    to = (view * chunks + chunk) * channels + c
    tl.store(partial + to, tl.sum(total, axis=0), mask=inside)
    tl.store(partial + tl.num_programs(2) * chunks * channels + to, tl.sum(squares, axis=0), mask=inside)


@jit
def _sum_chunks(partial, which, view, views, chunks, channels, c, inside):  # type: ignore[no-untyped-def]
    """One view's sum over the chunks of partial [sums, V, chunks, C], in a fixed order."""
    total = tl.zeros((CHUNKS, c.shape[0]), tl.float32)
    for chunk in range(0, chunks, CHUNKS):
        p = chunk + tl.arange(0, CHUNKS)
        at = ((which * views + view) * chunks + p)[:, None] * channels + c[None, :]
        total += tl.load(partial + at, mask=(p < chunks)[:, None] & inside[None, :], other=0.0)
    return tl.sum(total, axis=0)


@jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    partial, mean, rstd, running_mean, running_var, tracked,
    rows, channels, chunks, views, positions, step_views,
    momentum: tl.constexpr, eps: tl.constexpr, track: tl.constexpr, first: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """Mean (in: the pivots) and 1 / standard deviation [V, C]; updates the running statistics [C]."""
    c = tl.program_id(0) * size + tl.arange(0, size)
    inside = c < channels
    if track:
        new_mean = tl.load(running_mean + c, mask=inside, other=0.0)
        new_var = tl.load(running_var + c, mask=inside, other=0.0)
        decay = 1.0 - momentum
        if first:
            for _each in range(step_views):
                new_mean *= decay
                new_var *= decay
    for view in range(views):
        pivot = tl.load(mean + view * channels + c, mask=inside, other=0.0)
        away = _sum_chunks(partial, 0, view, views, chunks, channels, c, inside) / rows
        square = _sum_chunks(partial, 1, view, views, chunks, channels, c, inside) / rows
        var = tl.maximum(square - away * away, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(mean + view * channels + c, pivot + away, mask=inside)
        tl.store(rstd + view * channels + c, tl.rsqrt(var + eps), mask=inside)
        if track:
            weight = tl.full((), momentum, tl.float32)
            for _later in range(step_views - 1 - ((positions >> (5 * view)) & 31)):
                weight *= decay
            new_mean += weight * (pivot + away)
            new_var += weight * var * (rows / (rows - 1.0))
    if track:
        tl.store(running_mean + c, new_mean, mask=inside)
        tl.store(running_var + c, new_var, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(tracked, tl.load(tracked) + views)


@jit
def _normalise(x, mean, rstd, weight, bias, at, mask, row, c, inside, affine: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of x, normalised, scaled and shifted, in float32; `row` is the offset of the view's values in [V, C]."""
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
    """One tile of y. `kind` of shortcut: 0 none, 1 `other`, 2 `other` normalised with its own statistics."""
    c = tl.program_id(1) * size + tl.arange(0, size)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    view = tl.program_id(2)
    inside = c < channels
    mask = (r < rows)[:, None] & inside[None, :]
    at = (view.to(tl.int64) * rows + r)[:, None] * channels + c[None, :]
    row = view * channels
    value = _normalise(x, mean, rstd, weight, bias, at, mask, row, c, inside, affine)
    if kind == 1:
        value += tl.load(other + at, mask=mask, other=0.0).to(tl.float32)
    if kind == 2:
        value += _normalise(other, other_mean, other_rstd, other_weight, other_bias, at, mask, row, c, inside, affine)
    if relu:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)  # NaN must stay visible in a diverged run
    tl.store(y + at, value, mask=mask)


@jit
def pool_kernel(  # type: ignore[no-untyped-def]
    x, mean, rstd, weight, bias, y, taps, rows, channels, height, width, out_height, out_width,
    affine: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """One tile of 3x3 max-pooling (stride 2, padding 1) of relu(norm(x)), and the tap (0 to 8) of each maximum."""
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
        in_image = mask & ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
        at = ((image * height + h) * width + w)[:, None] * channels + c[None, :]
        value = _normalise(x, mean, rstd, weight, bias, at, in_image, view * channels, c, inside, affine)
        value = tl.where(
            in_image,
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
def _unpool(  # type: ignore[no-untyped-def]
    first, second, taps, r, view, rows, c, mask, channels, height, width, out_height, out_width, two: tl.constexpr
):  # fmt: skip
    """A tile of the gradient before max-pooling, gathered from the up to four windows that cover each pixel."""
    image = (view.to(tl.int64) * rows + r) // (height * width)
    h = r // width % height
    w = r % width
    gradient = tl.zeros((r.shape[0], c.shape[0]), tl.float32)
    for corner in tl.static_range(4):
        oh, ow = (h + 1) // 2 - corner // 2, (w + 1) // 2 - corner % 2
        i, j = h - 2 * oh + 1, w - 2 * ow + 1
        covers = (oh >= 0) & (oh < out_height) & (ow >= 0) & (ow < out_width) & (i < 3) & (j < 3)
        covered = mask & covers[:, None]
        at = ((image * out_height + oh) * out_width + ow)[:, None] * channels + c[None, :]
        value = tl.load(first + at, mask=covered, other=0.0).to(tl.float32)
        if two:
            value += tl.load(second + at, mask=covered, other=0.0).to(tl.float32)
        gradient += tl.where(tl.load(taps + at, mask=covered, other=-1) == (3 * i + j)[:, None], value, 0.0)
    return gradient


@jit
def _masked_gradient(  # type: ignore[no-untyped-def]
    first, second, x, mean, rstd, weight, bias, y, at, mask, r, view, rows, c, inside, channels,
    height, width, out_height, out_width,
    affine: tl.constexpr, relu: tl.constexpr, kind: tl.constexpr, two: tl.constexpr, pool: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient before ReLU, in float32: `first` (with `two` plus `second`), zero where ReLU gave zero.

    With `pool` the gradients are those of the pooled output, and `y` holds the taps.
    """
    row = view * channels
    if pool:
        gradient = _unpool(
            first, second, y, r, view, rows, c, mask, channels, height, width, out_height, out_width, two
        )
    else:
        gradient = tl.load(first + at, mask=mask, other=0.0).to(tl.float32)
        if two:
            gradient += tl.load(second + at, mask=mask, other=0.0).to(tl.float32)
    if relu:
        if kind == 0:
            value = _normalise(x, mean, rstd, weight, bias, at, mask, row, c, inside, affine)
        else:
            value = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.where(value > 0, gradient, 0.0)
    return gradient


@jit
def gradient_sums_kernel(  # type: ignore[no-untyped-def]
    first, second, x, mean, rstd, weight, bias, y, other, other_mean, masked, partial, rows, channels, chunks,
    height, width, out_height, out_width,
    affine: tl.constexpr, relu: tl.constexpr, kind: tl.constexpr, two: tl.constexpr, pool: tl.constexpr,
    size: tl.constexpr,
):  # fmt: skip
    """Partial sums of dy, dy * (x - mean) and with `kind` 2 dy * (other - other_mean): [2 or 3, V, chunks, C].

    With a shortcut the gradient before ReLU, which is the shortcut's gradient, is written to `masked`.
    """
    block, chunk, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = block * size + tl.arange(0, size)
    inside = c < channels
    row = view * channels
    centre = tl.load(mean + row + c, mask=inside, other=0.0)
    if kind == 2:
        other_centre = tl.load(other_mean + row + c, mask=inside, other=0.0)
        other_sum = tl.zeros((ROWS, size), tl.float32)
    chunk_rows = tl.cdiv(rows, chunks)
    total = tl.zeros((ROWS, size), tl.float32)
    product = tl.zeros((ROWS, size), tl.float32)
    for begin in range(chunk * chunk_rows, tl.minimum(chunk * chunk_rows + chunk_rows, rows), ROWS):
        r = begin + tl.arange(0, ROWS)
        mask = (r < tl.minimum(chunk * chunk_rows + chunk_rows, rows))[:, None] & inside[None, :]
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
    to = (view * chunks + chunk) * channels + c
    stride = tl.num_programs(2) * chunks * channels
    tl.store(partial + to, tl.sum(total, axis=0), mask=inside)
    tl.store(partial + stride + to, tl.sum(product, axis=0), mask=inside)
    if kind == 2:
        tl.store(partial + 2 * stride + to, tl.sum(other_sum, axis=0), mask=inside)


@jit
def coefficients_kernel(  # type: ignore[no-untyped-def]
    partial, rstd, weight, other_rstd, other_weight, slopes, constants, dweight, dbias, other_dweight,
    rows, channels, chunks, views,
    affine: tl.constexpr, kind: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """Coefficients of dx from the sums, and the gradients of weight and bias over all views.

    dx = scale * dy - (x - mean) * slope - constant. Slopes and constants are [1 or 2, V, C], the second for the
    shortcut's norm.
    """
    c = tl.program_id(0) * size + tl.arange(0, size)
    inside = c < channels
    all_dy = tl.zeros((size,), tl.float32)
    all_products = tl.zeros((size,), tl.float32)
    other_products = tl.zeros((size,), tl.float32)
    for view in range(views):
        at = view * channels + c
        sum_dy = _sum_chunks(partial, 0, view, views, chunks, channels, c, inside)
        inverse = tl.load(rstd + at, mask=inside, other=0.0)
        product = _sum_chunks(partial, 1, view, views, chunks, channels, c, inside) * inverse
        scale = inverse
        if affine:
            scale *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(slopes + at, scale * inverse * product / rows, mask=inside)
        tl.store(constants + at, scale * sum_dy / rows, mask=inside)
        all_dy += sum_dy
        all_products += product
        if kind == 2:
            offset = views * channels + at
            inverse = tl.load(other_rstd + at, mask=inside, other=0.0)
            product = _sum_chunks(partial, 2, view, views, chunks, channels, c, inside) * inverse
            scale = inverse
            if affine:
                scale *= tl.load(other_weight + c, mask=inside, other=0.0).to(tl.float32)
            tl.store(slopes + offset, scale * inverse * product / rows, mask=inside)
            tl.store(constants + offset, scale * sum_dy / rows, mask=inside)
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
    """One tile of dx, and with `kind` 2 of the gradient of `other`."""
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
        offset = tl.num_programs(2) * channels
        value = _dx(
            dy, other, other_mean, other_rstd, other_weight, slopes + offset, constants + offset,
            at, mask, row, c, inside, affine,
        )  # fmt: skip
        tl.store(other_dx + at, value, mask=mask)
