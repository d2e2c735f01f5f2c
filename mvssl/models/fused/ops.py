"""The BatchNorm kernels as custom operators that torch.compile can trace into: `torch.ops.mvssl.batchnorm_*`.

Launch kernels only as `wrap_triton(name)[...]`: torch finds them in the source by this pattern, so that its compile
cache notices a changed kernel.
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

_MAX_PROGRAMS = 1024
"""Upper limit of programs in a reduction, about eight per multiprocessor of an H100; more only add partial sums."""
_MAX_VIEWS = 12
"""Number of views whose positions, 5 bits each, fit into one int64."""


class _Shape(NamedTuple):
    """A BatchNorm input as V views of [rows, C], and how a reduction is divided among programs.

    Attributes:
        rows, channels: of each view.
        block, blocks: channels per program, and number of such blocks.
        chunks: number of chunks of rows.
    """

    rows: int
    channels: int
    block: int
    blocks: int
    chunks: int


def _shape(x: Tensor, views: int) -> _Shape:
    channels = x.shape[1]
    rows = x.numel() // channels // views
    block = max(16, min(64, triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, block)
    chunks = max(1, min(triton.cdiv(rows, 4 * ROWS.value), _MAX_PROGRAMS // (blocks * views)))
    return _Shape(rows, channels, block, blocks, chunks)


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] or [N, C] as [rows, C]; copies unless the images are channels-last."""
    return x.contiguous() if x.dim() == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """[rows, C] viewed in the shape of `like`: channels-last images or vectors."""
    if like.dim() == 2:
        return rows
    n, c, h, w = like.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def supports(x: Tensor, weight: Tensor | None, bias: Tensor | None, views: int) -> bool:
    """Whether the kernels support this input, apart from its device."""
    return (
        x.dim() in (2, 4)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (weight is None) == (bias is None)
        and (weight is None or weight.dtype is torch.float32)
        and views <= _MAX_VIEWS
    )


def statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    views: int,
    positions: list[int],
    step_views: int,
    first: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each view, float32 [V, C]; updates the running statistics in place.

    The update does not depend on the order of a step's forwards (`ViewBatchNorm._track`).

    Args:
        x: [V * B, C, H, W] or [V * B, C].
        running_mean, running_var, tracked: float32 [C], [C] and int64 []; all None without running statistics.
        views: V.
        positions: position of each view in the order of the step.
        step_views: number of views in that order.
        first: whether this is the layer's first forward of the step.
        momentum: of the running statistics.
        eps: added to the variance.
    """
    shape = _shape(x, views)
    flat = _rows(x)
    mean = torch.empty(views, shape.channels, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    partial = torch.empty(2, views, shape.chunks, shape.channels, dtype=torch.float32, device=x.device)
    wrap_triton(sums_kernel)[(shape.blocks, shape.chunks, views)](
        flat, mean, partial, shape.rows, shape.channels, shape.chunks, size=shape.block
    )
    track = running_mean is not None and running_var is not None and tracked is not None
    packed = sum(position << (5 * view) for view, position in enumerate(positions))
    wrap_triton(statistics_kernel)[(triton.cdiv(shape.channels, 16),)](
        partial,
        mean,
        rstd,
        running_mean if track else mean,
        running_var if track else rstd,
        tracked if track else rstd,
        shape.rows,
        shape.channels,
        shape.chunks,
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

    The shortcut is `other`, or its norm if `other_mean` and `other_rstd` are given; None for no shortcut.
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
    """3x3 max-pooling (stride 2, padding 1) of relu(norm(x)), and the tap (0 to 8, int8) of each maximum.

    Both are [V * B, C, H', W'] with H' = (H + 1) // 2. Of equal values the first tap wins, as in torch.
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
        first, second: gradients from the one or two users of the output.
        x, mean, rstd, weight, bias: as in the forward.
        y: the output, if the forward had a shortcut and ReLU; the taps, if it had pooling.
        other, other_mean, other_rstd, other_weight: as in the forward, if the shortcut has a norm.
        relu: whether the forward had ReLU.
        shortcut: whether it had a shortcut.
        pool: whether it had max-pooling.

    Returns:
        dx, dweight, dbias, the gradient of `other`, and other_dweight (other_dbias equals dbias). Gradients that do not
        apply are empty tensors.
    """
    views = len(mean)
    shape = _shape(x, views)
    kind = 0 if not shortcut else 1 if other is None else 2
    num_sums = 3 if kind == 2 else 2
    empty = torch.empty(0, dtype=torch.float32, device=x.device)
    affine = weight is not None
    flat, gradient = _rows(x), _rows(first)
    # Outputs are separate tensors: the compiler would copy views of a larger one.
    masked = torch.empty_like(flat) if kind else empty
    dx = torch.empty_like(flat)
    other_dx = torch.empty_like(flat) if kind == 2 else empty
    partial = torch.empty(num_sums, views, shape.chunks, shape.channels, dtype=torch.float32, device=x.device)
    slopes = torch.empty(num_sums - 1, views, shape.channels, dtype=torch.float32, device=x.device)
    constants = torch.empty_like(slopes)
    dweight = torch.empty(shape.channels if affine else 0, dtype=torch.float32, device=x.device)
    dbias = torch.empty_like(dweight)
    other_dweight = torch.empty_like(dweight) if kind == 2 else empty
    # `mean` stands in for unused pointers, so that they keep no other tensor alive.
    extra = mean if second is None else _rows(second)
    scale, shift = (mean, mean) if weight is None or bias is None else (weight, bias)
    output = mean if y is None else _rows(y)
    flat_other = mean if other is None else _rows(other)
    centre, inverse = (mean, mean) if other_mean is None or other_rstd is None else (other_mean, other_rstd)
    factor = mean if other_weight is None else other_weight
    sizes = (*x.shape[2:], *first.shape[2:]) if pool else (1, 1, 1, 1)
    wrap_triton(gradient_sums_kernel)[(shape.blocks, shape.chunks, views)](
        gradient, extra, flat, mean, rstd, scale, shift, output, flat_other, centre,
        masked if kind else dbias, partial, shape.rows, shape.channels, shape.chunks, *sizes,
        affine=affine, relu=relu, kind=kind, two=second is not None, pool=pool, size=shape.block,
    )  # fmt: skip
    wrap_triton(coefficients_kernel)[(triton.cdiv(shape.channels, 16),)](
        partial, rstd, scale, inverse, factor, slopes, constants, dweight, dbias, other_dweight,
        shape.rows, shape.channels, shape.chunks, views,
        affine=affine, kind=kind, size=16,
    )  # fmt: skip
    wrap_triton(backward_kernel)[(triton.cdiv(shape.rows, ROWS.value), shape.blocks, views)](
        mean if kind else gradient, mean if kind else extra, flat, mean, rstd, scale, shift, output if pool else mean,
        flat_other, centre, inverse, factor, masked if kind else mean, slopes, constants,
        dx, other_dx if kind == 2 else dx, shape.rows, shape.channels, *sizes,
        affine=affine, relu=relu, kind=kind, two=second is not None, pool=pool, size=shape.block,
    )  # fmt: skip
    dshortcut = _images(other_dx if kind == 2 else masked, x) if kind else empty
    return _images(dx, x), dweight, dbias, dshortcut, other_dweight


triton_op("mvssl::batchnorm_statistics", statistics, mutates_args={"running_mean", "running_var", "tracked"})
triton_op("mvssl::batchnorm_forward", forward, mutates_args=())
triton_op("mvssl::batchnorm_forward_pool", forward_pool, mutates_args=())
triton_op("mvssl::batchnorm_backward", backward, mutates_args=())
