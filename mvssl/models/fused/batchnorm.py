"""Training BatchNorm per view with optional residual and ReLU, as one autograd function with an explicit gradient.

A compiled step is limited by memory traffic. Autograd of the broadcast formula would sum per image first and read
ReLU's mask from its saved output. Here the sums go straight to [V, C], and without a residual the mask is recomputed
from the input, which is read anyway. On a GPU this runs as Triton kernels, whose traffic does not depend on the
compiler's fusion; elsewhere the compiler gets the formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def operations() -> Any:
    """The operators of `mvssl.models.fused.ops`, which must be imported first."""
    return torch.ops.mvssl


def _per_channel(rows: Tensor, dims: int) -> Tensor:
    """Reshape [V, C] to broadcast over [V, B, C, ...] of `dims` dimensions."""
    views, channels = rows.shape
    return rows.view(views, 1, channels, *[1] * (dims - 3))


class _BatchNormTraining(torch.autograd.Function):
    """relu(weight * (x - mean) * rstd + bias + shortcut); weight, bias, shortcut and ReLU are optional."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shortcut: Tensor | None,
        views: int,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = _by_view(x, views)  # [V, B, C, ...]
        dims = [d for d in range(wide.dim()) if d not in (0, 2)]
        var, mean = torch.var_mean(wide, dim=dims, correction=0)  # [V, C]
        rstd = torch.rsqrt(var + eps)  # [V, C]
        scale = rstd if weight is None else rstd * weight  # [V, C]
        y = (wide - _per_channel(mean, wide.dim())) * _per_channel(scale, wide.dim())
        if bias is not None:
            y = y + bias.view(1, 1, -1, *[1] * (wide.dim() - 3))
        if shortcut is not None:
            y = y + _by_view(shortcut, views)
        if relu:
            y = y.relu()
        out = y.flatten(0, 1).to(x.dtype, copy=True)  # [V * B, C, ...]; a copy, as in-place operations may follow
        count = wide[:, :, 0].numel() // views
        # With a residual the mask comes from the output, which the next convolution saves anyway.
        ctx.save_for_backward(x, weight, bias, mean, rstd, out if relu and shortcut is not None else None)
        ctx.views, ctx.relu, ctx.count = views, relu, count
        ctx.shortcut_dtype = None if shortcut is None else shortcut.dtype
        unbiased = var * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return out, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd, out = ctx.saved_tensors
        wide = _by_view(x, ctx.views)  # [V, B, C, ...]
        dims = [d for d in range(wide.dim()) if d not in (0, 2)]
        scale = rstd if weight is None else rstd * weight  # [V, C]
        centred = wide - _per_channel(mean, wide.dim())
        gradient = gradients[0]
        if out is not None:
            gradient = torch.where(out > 0, gradient, 0.0)
        elif ctx.relu:
            y = centred * _per_channel(scale, wide.dim())
            if bias is not None:
                y = y + bias.view(1, 1, -1, *[1] * (wide.dim() - 3))
            gradient = torch.where(y.flatten(0, 1) > 0, gradient, 0.0)
        dy = _by_view(gradient, ctx.views)
        sum_dy = dy.sum(dims)  # [V, C]
        sum_dy_xhat = (dy * centred).sum(dims) * rstd  # [V, C]
        # dx = scale * (dy - mean(dy) - xhat * mean(dy * xhat))
        constant = scale * sum_dy / ctx.count
        slope = scale * rstd * sum_dy_xhat / ctx.count
        dx = dy * _per_channel(scale, wide.dim())
        dx = dx - centred * _per_channel(slope, wide.dim()) - _per_channel(constant, wide.dim())
        return (
            dx.flatten(0, 1).to(x.dtype),
            None if weight is None else sum_dy_xhat.sum(0),
            None if bias is None else sum_dy.sum(0),
            None if ctx.shortcut_dtype is None else gradient.to(ctx.shortcut_dtype),
            None,
            None,
            None,
        )


def _by_view(x: Tensor, views: int) -> Tensor:
    """[V * B, C, ...] as [V, B, C, ...], in float32 or wider."""
    return torch.unflatten(x.to(torch.promote_types(x.dtype, torch.float32)), 0, (views, -1))


def batch_norm_training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    views: int,
    eps: float,
    relu: bool = False,
    shortcut: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each of V views by its own statistics.

    Meant for the compiler, which fuses the formula with its surroundings; each operation runs alone without it.

    Args:
        x: [V * B, C, ...], the views one after another.
        weight, bias: [C], or None.
        views: V.
        eps: added to the variance.
        relu: whether ReLU follows.
        shortcut: [V * B, C, ...], added before ReLU; None for no residual.

    Returns:
        The output, of x's shape and dtype; mean and unbiased variance of each view [V, C], float32 or float64, without
        gradient.
    """
    apply: Any = _BatchNormTraining.apply
    result: tuple[Tensor, Tensor, Tensor] = apply(x, weight, bias, shortcut, views, eps, relu)
    return result


class _BatchNormKernels(torch.autograd.Function):
    """The same with Triton kernels, given the statistics.

    With `split` the output is returned twice: the backward adds the gradients of its two users as it reads them.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
        pool: bool,
        split: bool,
    ) -> tuple[Tensor, ...]:
        ops = operations()
        if pool:
            y, mask = ops.batchnorm_forward_pool(x, mean, rstd, weight, bias)
        else:
            y = ops.batchnorm_forward(
                x, mean, rstd, weight, bias, other, other_mean, other_rstd, other_weight, other_bias, relu
            )
            mask = y if relu and other is not None else None
        ctx.relu, ctx.pool, ctx.shortcut, ctx.normed = relu, pool, other is not None, other_mean is not None
        shortcut_norm = (other, other_mean, other_rstd, other_weight) if ctx.normed else (None, None, None, None)
        ctx.save_for_backward(x, mean, rstd, weight, bias, mask, *shortcut_norm)
        return (y, y.view_as(y)) if split else (y,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        first, second = gradients[0], gradients[1] if len(gradients) > 1 else None
        ops = operations()
        dx, dweight, dbias, dother, other_dweight = ops.batchnorm_backward(
            first, second, *ctx.saved_tensors, ctx.relu, ctx.shortcut, ctx.pool
        )
        affine = ctx.saved_tensors[3] is not None
        normed = affine and ctx.normed
        return (
            dx,
            None,
            None,
            dweight if affine else None,
            dbias if affine else None,
            dother if ctx.shortcut else None,
            None,
            None,
            other_dweight if normed else None,
            dbias if normed else None,
            None,
            None,
            None,
        )


def batch_norm_kernels(
    x: Tensor,
    statistics: tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    relu: bool = False,
    pool: bool = False,
    other: Tensor | None = None,
    other_statistics: tuple[Tensor, Tensor] | None = None,
    other_weight: Tensor | None = None,
    other_bias: Tensor | None = None,
    split: bool = False,
) -> tuple[Tensor, ...]:
    """relu(norm(x) + shortcut) by Triton kernels.

    Args:
        x: [V * B, C, H, W] or [V * B, C], the views one after another.
        statistics: mean and 1 / standard deviation [V, C] of x.
        weight, bias: [C] float32, both or none.
        relu: whether ReLU follows.
        pool: whether 3x3 max-pooling (stride 2, padding 1) follows ReLU; not with a shortcut.
        other: of x's shape, the shortcut before its norm, if it has one.
        other_statistics, other_weight, other_bias: of the shortcut's norm.
        split: whether to return the output twice, once for each of its two users.

    Returns:
        The output once or twice, of x's shape (pooled: [V * B, C, H', W']) and dtype.
    """
    other_mean, other_rstd = (None, None) if other_statistics is None else other_statistics
    apply: Any = _BatchNormKernels.apply
    result: tuple[Tensor, ...] = apply(
        x, *statistics, weight, bias, other, other_mean, other_rstd, other_weight, other_bias, relu, pool, split
    )
    return result
