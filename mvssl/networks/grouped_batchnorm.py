"""BatchNorm of several views that pass through a network as one batch, each view normalised over its own images.

Views concatenated through a common BatchNorm are another method (SPEC section 3). Here a batch [V * B, C, ...] holds V
views of B images one behind the other, and every BatchNorm works on V groups: the same numbers as V forwards, with the
convolutions and matrix products between the norms launched once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Pass:
    """Which views of a step a network's forward holds; shared by all norms of the network.

    Attributes:
        views: place of each view in the step's order, (0,) for a forward on its own.
        of: views in the whole step; 1 for a forward on its own.
        first: whether this is the first of the step's forwards.
    """

    def __init__(self) -> None:
        self.views: tuple[int, ...] = (0,)
        self.of = 1
        self.first = True

    def set(self, views: tuple[int, ...], of: int, *, first: bool) -> None:
        """Say what the next forward holds."""
        self.views, self.of, self.first = views, of, first

    def reset(self) -> None:
        """Back to forwards that stand alone."""
        self.views, self.of, self.first = (0,), 1, True


class _Grouped(_BatchNorm):
    """Mixed in before a BatchNorm: in training it normalises the views of its network's `Pass` one by one."""

    current: Pass

    @property
    def alone(self) -> bool:
        """Whether the original forward does."""
        return not self.training or self.current.of == 1

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [V * B, C, ...]."""
        if self.alone:
            result: Tensor = super().forward(x)
            return result
        return self.normalise(x)

    def normalise(self, x: Tensor) -> Tensor:
        """Normalise each view of [V * B, C, ...] and let the running statistics follow."""
        apart = _by_formula if torch.compiler.is_compiling() else _view_by_view
        y, mean, var = apart(x, len(self.current.views), self.weight, self.bias, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            self._track(mean, var)
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics by this forward's views [V, C].

        n views one after the other leave (1 - m)^n r + sum over views of m (1 - m)^(n - 1 - place) statistic: a sum, so
        the forwards of a step may come in any order, and the first one brings the decay.
        """
        momentum = self.momentum if self.momentum is not None else 0.1
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            if running is None:
                continue
            if self.current.first:
                running.mul_((1 - momentum) ** self.current.of)
            for place, value in zip(self.current.views, batch.unbind(), strict=True):
                running.add_(value, alpha=momentum * (1 - momentum) ** (self.current.of - 1 - place))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += len(self.current.views)


def _view_by_view(
    x: Tensor, views: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own kernel for each view, where nothing would fuse the formula.

    Returns:
        The normalised batch, and the mean and unbiased variance [V, C] of each view.
    """
    dtype = torch.promote_types(x.dtype, torch.float32) if weight is None else weight.dtype
    mean = torch.zeros(views, x.shape[1], dtype=dtype, device=x.device)
    var = torch.zeros_like(mean)
    parts = [
        # With momentum 1 it leaves the statistics of this view in the rows given to it.
        F.batch_norm(part, mean[v], var[v], weight, bias, training=True, momentum=1.0, eps=eps)
        for v, part in enumerate(x.chunk(views))
    ]
    return torch.cat(parts), mean, var


def _by_formula(
    x: Tensor, views: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as one formula for all views, which the compiler fuses with what stands around it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # [V * B, C, ...]
    apart = torch.unflatten(wide, 0, (views, -1))  # [V, B, C, ...]
    dims = [d for d in range(apart.dim()) if d not in (0, 2)]
    var, mean = torch.var_mean(apart, dim=dims, correction=0)  # [V, C] each
    images = apart.shape[1]

    def each(rows: Tensor) -> Tensor:
        """[V, C] as [V * B, C, 1, ...]: batches keep their shape and so their memory layout."""
        return rows.repeat_interleave(images, dim=0).reshape(len(x), -1, *[1] * (x.dim() - 2))

    y = (wide - each(mean)) * each(torch.rsqrt(var + eps))
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    count = apart.numel() // (views * apart.shape[2])
    return y.to(x.dtype), mean.detach(), var.detach() * (count / (count - 1))


class GroupedBatchNorm1d(_Grouped, nn.BatchNorm1d):
    """nn.BatchNorm1d of several views."""


class GroupedBatchNorm2d(_Grouped, nn.BatchNorm2d):
    """nn.BatchNorm2d of several views."""


class GroupedBatchNormAct2d(_Grouped, BatchNormAct2d):
    """timm's BatchNorm with activation, of several views."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate [V * B, C, H, W]."""
        activated: Any = BatchNormAct2d  # Any: timm ships no types
        y: Tensor = activated.forward(self, x) if self.alone else self.act(self.drop(self.normalise(x)))
        return y


_GROUPED: dict[type[nn.Module], type[_Grouped]] = {
    nn.BatchNorm1d: GroupedBatchNorm1d,
    nn.BatchNorm2d: GroupedBatchNorm2d,
    BatchNormAct2d: GroupedBatchNormAct2d,
}


def ungroupable(network: nn.Module) -> str | None:
    """Name and type of the first layer of a network that knows its batch in a way of its own; None if there is none.

    What keeps statistics of the batch (`running_var`) and is none of the known BatchNorms is such a layer. LayerNorm,
    GroupNorm and the like look at one image at a time and need nothing.
    """
    for name, module in network.named_modules():
        keeps = any(key.startswith("running_") for key, _ in module.named_buffers(recurse=False))
        known = type(module) in _GROUPED or isinstance(module, _Grouped)
        if (keeps or isinstance(module, _BatchNorm)) and not (known and module.momentum is not None):
            return f"{name or 'itself'} ({type(module).__name__})"
    return None


def group_batchnorms(network: nn.Module, current: Pass) -> None:
    """Exchange the BatchNorms of a network in place; parameters, buffers and their names stay.

    Only the class of a layer changes, so that whatever refers to it (hooks, a model's own attributes) goes on to.
    """
    for module in network.modules():
        grouped: Any = _GROUPED.get(type(module))
        if grouped is not None:
            module.__class__ = grouped
            module.current = current  # type: ignore[assignment]  # a plain object, no part of the state
