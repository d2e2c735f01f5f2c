"""BatchNorm's Triton kernels as operations that the compiler looks into: `torch.ops.mvssl.batchnorm_*`.

Kernels are launched by `wrap_triton(name)` and nothing else: torch finds them so in the source, and its cache of
compiled code then knows when a kernel has changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mvssl.models.fused.kernels import (
    ROWS,
    backward_kernel,
    coefficients_kernel,
    forward_kernel,
    gradient_sums_kernel,
    pool_kernel,
    statistics_kernel,
    sums_kernel,
)

_PROGRAMS = 1024
"""Programs that sum at most, about eight per multiprocessor of an H100: more would only make more partial sums."""
_MOST_VIEWS = 12
"""Views whose places in the step's order fit into one int64 of 5 bits each."""


class _Shape(NamedTuple):
    """How a BatchNorm's input is seen: V views of `rows` rows of C channels."""

    rows: int
    channels: int
    block: int
    blocks: int
    parts: int


def _shape(x: Tensor, views: int) -> _Shape:
    channels = x.shape[1]
    rows = x.numel() // channels // views
    block = max(16, min(64, triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, block)
    parts = max(1, min(triton.cdiv(rows, 4 * ROWS.value), _PROGRAMS // (blocks * views)))
    return _Shape(rows, channels, block, blocks, parts)


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] or [N, C] as [rows, C]: a view of channels-last images, a copy of others."""
    return x.contiguous() if x.dim() == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """[rows, C] in the shape of `like`, as a view: channels-last images or vectors."""
    if like.dim() == 2:
        return rows
    n, c, h, w = like.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def fits(x: Tensor, weight: Tensor | None, bias: Tensor | None, views: int) -> bool:
    """Whether the kernels know this input, apart from its device."""
    return (
        x.dim() in (2, 4)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (weight is None) == (bias is None)
        and (weight is None or weight.dtype is torch.float32)
        and views <= _MOST_VIEWS
    )


def statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    views: int,
    places: list[int],
    step_views: int,
    first: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Each view's mean and 1 / standard deviation, float32 [V, C]; moves the running statistics in place.

    n views one after the other leave (1 - m)^n r + sum over views of m (1 - m)^(n - 1 - place) statistic: a sum, so the
    forwards of a step may come in any order, and the first one brings the decay.

    Args:
        x: [V * B, C, H, W] or [V * B, C].
        running_mean, running_var, tracked: float32 [C], [C] and int64 []; all None without running statistics.
        views: V.
        places: place of each view among the views of the step.
        step_views: views of the whole step.
        first: whether this is the step's first forward of the layer.
        momentum: of the running statistics.
        eps: added to the variance.
    """
    shape = _shape(x, views)
    flat = _rows(x)
    mean = torch.empty(views, shape.channels, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    partial = torch.empty(2, views, shape.parts, shape.channels, dtype=torch.float32, device=x.device)
    wrap_triton(sums_kernel)[(shape.blocks, shape.parts, views)](
        flat, mean, partial, shape.rows, shape.channels, shape.parts, size=shape.block
    )
    track = running_mean is not None and running_var is not None and tracked is not None
    packed = sum(place << (5 * view) for view, place in enumerate(places))
    wrap_triton(statistics_kernel)[(triton.cdiv(shape.channels, 16),)](
        partial,
        mean,
        rstd,
        running_mean if track else mean,
        running_var if track else rstd,
        tracked if track else rstd,
        shape.rows,
        shape.channels,
        shape.parts,
        views,
        packed,
        step_views,
        momentum=momentum,
        eps=eps,
        track=track,
        first=first,
        size=16,
    )
    return mean, rstd


def forward(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    other_mean: Tensor | None,
    other_rstd: Tensor | None,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """relu(norm(x) + shortcut), of x's shape and dtype.

    The shortcut is `other`, or with statistics `other_mean` and `other_rstd` a norm of it; None is no shortcut.
    """
    views = len(mean)
    shape = _shape(x, views)
    flat = _rows(x)
    y = torch.empty_like(flat)
    kind = 0 if other is None else 1 if other_mean is None else 2
    wrap_triton(forward_kernel)[(triton.cdiv(shape.rows, ROWS.value), shape.blocks, views)](
        flat,
        mean,
        rstd,
        mean if weight is None else weight,
        mean if bias is None else bias,
        mean if other is None else _rows(other),
        mean if other_mean is None else other_mean,
        mean if other_rstd is None else other_rstd,
        mean if other_weight is None else other_weight,
        mean if other_bias is None else other_bias,
        y,
        shape.rows,
        shape.channels,
        affine=weight is not None,
        relu=relu,
        kind=kind,
        size=shape.block,
    )
    return _images(y, x)


def forward_pool(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """3x3 max-pooling (stride 2, padding 1) of relu(norm(x)), and the tap 0 to 8 that each value came from, int8.

    Both are [V * B, C, H', W'], H' = (H + 1) // 2. Equal values: the first tap counts, as in torch.
    """
    views = len(mean)
    shape = _shape(x, views)
    images, channels, height, width = x.shape
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    rows = images // views * out_height * out_width
    y = torch.empty(views * rows, channels, dtype=x.dtype, device=x.device)
    taps = torch.empty(views * rows, channels, dtype=torch.int8, device=x.device)
    scale, shift = (mean, mean) if weight is None or bias is None else (weight, bias)
    wrap_triton(pool_kernel)[(triton.cdiv(rows, ROWS.value), shape.blocks, views)](
        _rows(x), mean, rstd, scale, shift, y, taps, rows, channels, height, width, out_height, out_width,
        affine=weight is not None, size=shape.block,
    )  # fmt: skip
    nhwc = (images, out_height, out_width, channels)
    return y.view(nhwc).permute(0, 3, 1, 2), taps.view(nhwc).permute(0, 3, 1, 2)


def backward(
    first: Tensor,
    second: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    other: Tensor | None,
    other_mean: Tensor | None,
    other_rstd: Tensor | None,
    other_weight: Tensor | None,
    relu: bool,
    shortcut: bool,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`, or with `pool` of `forward_pool`.

    Args:
        first, second: gradients of the output from one or two of its users.
        x, mean, rstd, weight, bias: as in the forward.
        y: its output, where a shortcut and ReLU are in it; with `pool` the taps.
        other, other_mean, other_rstd, other_weight: as in the forward where the shortcut has a norm.
        relu: whether ReLU is in it.
        shortcut: whether a shortcut is in it.
        pool: whether max-pooling follows ReLU.

    Returns:
        dx, dweight, dbias, the shortcut's gradient (that of `other` before its norm), and other_dweight; other_dbias
        is dbias. What does not apply is an empty tensor.
    """
    views = len(mean)
    shape = _shape(x, views)
    kind = 0 if not shortcut else 1 if other is None else 2
    kinds = 3 if kind == 2 else 2
    nothing = torch.empty(0, dtype=torch.float32, device=x.device)
    affine = weight is not None
    flat, gradient = _rows(x), _rows(first)
    # What kernels write are tensors of their own: the compiler would copy views of others.
    masked = torch.empty_like(flat) if kind else nothing
    dx = torch.empty_like(flat)
    other_dx = torch.empty_like(flat) if kind == 2 else nothing
    partial = torch.empty(kinds, views, shape.parts, shape.channels, dtype=torch.float32, device=x.device)
    slopes = torch.empty(kinds - 1, views, shape.channels, dtype=torch.float32, device=x.device)
    constants = torch.empty_like(slopes)
    dweight = torch.empty(shape.channels if affine else 0, dtype=torch.float32, device=x.device)
    dbias = torch.empty_like(dweight)
    other_dweight = torch.empty_like(dweight) if kind == 2 else nothing
    # Pointers that a kernel does not use are `mean`, so that nothing is kept alive for them.
    extra = mean if second is None else _rows(second)
    scale, shift = (mean, mean) if weight is None or bias is None else (weight, bias)
    output = mean if y is None else _rows(y)
    flat_other = mean if other is None else _rows(other)
    centre, inverse = (mean, mean) if other_mean is None or other_rstd is None else (other_mean, other_rstd)
    factor = mean if other_weight is None else other_weight
    sizes = (*x.shape[2:], *first.shape[2:]) if pool else (1, 1, 1, 1)
    wrap_triton(gradient_sums_kernel)[(shape.blocks, shape.parts, views)](
        gradient, extra, flat, mean, rstd, scale, shift, output, flat_other, centre,
        masked if kind else dbias, partial, shape.rows, shape.channels, shape.parts, *sizes,
        affine=affine, relu=relu, kind=kind, two=second is not None, pool=pool, size=shape.block,
    )  # fmt: skip
    wrap_triton(coefficients_kernel)[(triton.cdiv(shape.channels, 16),)](
        partial, rstd, scale, inverse, factor, slopes, constants, dweight, dbias, other_dweight,
        shape.rows, shape.channels, shape.parts, views,
        affine=affine, kind=kind, size=16,
    )  # fmt: skip
    wrap_triton(backward_kernel)[(triton.cdiv(shape.rows, ROWS.value), shape.blocks, views)](
        mean if kind else gradient, mean if kind else extra, flat, mean, rstd, scale, shift, output if pool else mean,
        flat_other, centre, inverse, factor, masked if kind else mean, slopes, constants,
        dx, other_dx if kind == 2 else dx, shape.rows, shape.channels, *sizes,
        affine=affine, relu=relu, kind=kind, two=second is not None, pool=pool, size=shape.block,
    )  # fmt: skip
    dshortcut = _images(other_dx if kind == 2 else masked, x) if kind else nothing
    return _images(dx, x), dweight, dbias, dshortcut, other_dweight


triton_op("mvssl::batchnorm_statistics", statistics, mutates_args={"running_mean", "running_var", "tracked"})
triton_op("mvssl::batchnorm_forward", forward, mutates_args=())
triton_op("mvssl::batchnorm_forward_pool", forward_pool, mutates_args=())
triton_op("mvssl::batchnorm_backward", backward, mutates_args=())
