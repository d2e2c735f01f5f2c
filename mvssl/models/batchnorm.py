"""BatchNorm per view in batches of several views, and BatchNorm over all ranks.

Concatenating views through a common BatchNorm is another method (PAPER.md section 3). Here a batch [V * B, C, ...]
holds V views of B images, and every BatchNorm normalises V groups: the numbers of V forwards, with one launch per
convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from mvssl.models.fused import batchnorm as batchnorm_function
from mvssl.models.fused.batchnorm import batch_norm_kernels, batch_norm_training


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _mean_over_ranks(x: Tensor, ranks: int) -> Tensor:
    apply: Any = _SumOverRanks.apply  # untyped before torch 2.12
    total: Tensor = apply(x)
    return total / ranks


def _batch_norm(
    input: Tensor,  # the names are torch.nn.functional.batch_norm's, which callers may use
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    ranks: int,
) -> Tensor:
    """`torch.nn.functional.batch_norm` of the batches [B, C, ...] of all ranks together; every rank has B images."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    others = [dim for dim in range(x.dim()) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    count = x.numel() // x.shape[1] * ranks
    mean = _mean_over_ranks(x.mean(dim=others), ranks)  # [C]
    centred = x - mean.view(shape)
    var = _mean_over_ranks(centred.square().mean(dim=others), ranks)  # [C]
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    out = centred * torch.rsqrt(var + eps).view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    return out.to(input.dtype)


class SyncBatchNorm(TorchFunctionMode):
    """While this is entered, every BatchNorm in training takes its statistics over the images of `ranks` ranks.

    All ranks must call the same layers in the same order with batches of one size. Gradients are those of the sum of
    the ranks' losses; DistributedDataParallel's mean over the ranks makes them those of the mean loss.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ranks = ranks

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}), ranks=self._ranks)
        return func(*args, **(kwargs or {}))


try:
    from mvssl.models.fused.ops import fits

    KERNEL_DEVICES: tuple[str, ...] = ("cuda",)
except ImportError:  # Triton has no wheel for this platform
    KERNEL_DEVICES = ()
"""Devices on which compiled norms are our Triton kernels."""


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


class Grouped(_BatchNorm):
    """Mixed in before a BatchNorm: in training it normalises the views of its network's `Pass` one by one."""

    current: Pass

    @property
    def alone(self) -> bool:
        """Whether the original forward does."""
        return not self.training or (self.current.of == 1 and not torch.compiler.is_compiling())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [V * B, C, ...]."""
        if self.alone:
            result: Tensor = super().forward(x)
            return result
        return self.normalise(x)

    def normalise(self, x: Tensor, *, relu: bool = False) -> Tensor:
        """Normalise each view of [V * B, C, ...] and update the running statistics; with `relu` only when compiled."""
        if torch.compiler.is_compiling():
            return self.fused(x, relu=relu)[0]
        y, mean, var = _view_by_view(x, len(self.current.views), self.weight, self.bias, self.eps)
        self._track(mean, var)
        return y

    def fused(
        self,
        x: Tensor,
        *,
        relu: bool,
        pool: bool = False,
        shortcut: Tensor | None = None,
        shortcut_norm: Grouped | None = None,
        split: bool = False,
    ) -> tuple[Tensor, ...]:
        """relu(norm(x) + shortcut) for the compiler, and update the running statistics.

        Args:
            x: [V * B, C, ...], the views one after the other.
            relu: whether ReLU follows.
            pool: whether 3x3 max-pooling (stride 2, padding 1) follows ReLU; without a shortcut.
            shortcut: of x's shape, added before ReLU.
            shortcut_norm: normalises the shortcut first.
            split: whether to return the result twice, so that the gradients of two users are added while they are read.
        """
        if self._by_kernels(x) and (shortcut_norm is None or shortcut_norm._by_kernels(x)):
            norm = shortcut_norm if shortcut is not None else None
            return batch_norm_kernels(
                x,
                self._statistics(x),
                self.weight,
                self.bias,
                relu=relu,
                pool=pool,
                other=shortcut,
                other_statistics=None if norm is None or shortcut is None else norm._statistics(shortcut),
                other_weight=None if norm is None else norm.weight,
                other_bias=None if norm is None else norm.bias,
                split=split,
            )
        if shortcut is not None and shortcut_norm is not None:
            shortcut = shortcut_norm.normalise(shortcut)
        views = len(self.current.views)
        y, mean, var = batch_norm_training(
            x, self.weight, self.bias, views=views, eps=self.eps, relu=relu, shortcut=shortcut
        )
        self._track(mean, var)
        if pool:
            y = F.max_pool2d(y, 3, 2, 1)
        return (y, y) if split else (y,)

    def _by_kernels(self, x: Tensor) -> bool:
        """Whether our Triton kernels normalise this input."""
        return x.device.type in KERNEL_DEVICES and fits(x, self.weight, self.bias, len(self.current.views))

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / standard deviation of each view [V, C]; the running statistics follow."""
        current = self.current
        mean, rstd = batchnorm_function.operations().batchnorm_statistics(
            x.detach(),
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            len(current.views),
            list(current.views),
            current.of,
            current.first,
            self.momentum if self.momentum is not None else 0.1,
            self.eps,
        )
        return mean, rstd

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics by this forward's views [V, C].

        n views one after the other leave (1 - m)^n r + sum over views of m (1 - m)^(n - 1 - place) statistic: a sum, so
        the forwards of a step may come in any order, and the first one brings the decay.
        """
        if self.running_mean is None:
            return
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


class GroupedBatchNorm1d(Grouped, nn.BatchNorm1d):
    """nn.BatchNorm1d of several views."""


class GroupedBatchNorm2d(Grouped, nn.BatchNorm2d):
    """nn.BatchNorm2d of several views."""


class GroupedBatchNormAct2d(Grouped, BatchNormAct2d):
    """timm's BatchNorm with activation, of several views."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate [V * B, C, H, W]."""
        original: Any = BatchNormAct2d  # Any: timm ships no types
        y: Tensor
        if self.alone:
            y = original.forward(self, x)
        elif torch.compiler.is_compiling() and type(self.act) is nn.ReLU and isinstance(self.drop, nn.Identity):
            y = self.normalise(x, relu=True)
        else:
            y = self.act(self.drop(self.normalise(x)))
        return y


_GROUPED: dict[type[nn.Module], type[Grouped]] = {
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
        known = type(module) in _GROUPED or isinstance(module, Grouped)
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
