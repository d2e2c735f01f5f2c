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
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from mvssl.models.fused import batchnorm as batchnorm_function
from mvssl.models.fused.batchnorm import batch_norm_kernels, batch_norm_training

try:
    from mvssl.models.fused.ops import supports

    KERNEL_DEVICES: tuple[str, ...] = ("cuda",)
except ImportError:  # Triton has no wheel for this platform
    KERNEL_DEVICES = ()
"""Devices on which compiled norms run as our Triton kernels."""


class ForwardViews:
    """The views in the current forward of a network; one object, shared by all its norms.

    Attributes:
        positions: of each view in its group, whose order the running statistics follow; (0,) for a single view.
        total: number of views in the group; 1 for a single view.
        first: whether this is the group's first forward.
    """

    def __init__(self) -> None:
        self.positions: tuple[int, ...] = (0,)
        self.total = 1
        self.first = True

    def set(self, positions: tuple[int, ...], total: int, *, first: bool) -> None:
        """Describe the next forward."""
        self.positions, self.total, self.first = positions, total, first

    def reset(self) -> None:
        """Return to single views."""
        self.positions, self.total, self.first = (0,), 1, True

    def state(self) -> tuple[tuple[int, ...], int, bool]:
        """What `set_state` takes."""
        return self.positions, self.total, self.first

    def set_state(self, state: tuple[tuple[int, ...], int, bool]) -> None:
        """Return to the views of another forward."""
        self.positions, self.total, self.first = state


class ViewBatchNorm(_BatchNorm):
    """Mixin for BatchNorm layers that normalises each view of the current forward over its own images in training."""

    current: ForwardViews

    @property
    def plain(self) -> bool:
        """Whether the layer's original forward is used."""
        return not self.training or (self.current.total == 1 and not torch.compiler.is_compiling())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [V * B, C, ...]."""
        if self.plain:
            result: Tensor = super().forward(x)
            return result
        return self.normalise(x)

    def normalise(self, x: Tensor, *, relu: bool = False) -> Tensor:
        """Normalise each view of [V * B, C, ...] and update the running statistics; with `relu` only when compiled."""
        if torch.compiler.is_compiling():
            return self.fused(x, relu=relu)[0]
        y, mean, var = _view_by_view(x, len(self.current.positions), self.weight, self.bias, self.eps)
        self._track(mean, var)
        return y

    def fused(
        self,
        x: Tensor,
        *,
        relu: bool,
        pool: bool = False,
        shortcut: Tensor | None = None,
        shortcut_norm: ViewBatchNorm | None = None,
        split: bool = False,
    ) -> tuple[Tensor, ...]:
        """relu(norm(x) + shortcut) in compiled training, with an update of the running statistics.

        Args:
            x: [V * B, C, ...], the views one after another.
            relu: whether ReLU follows.
            pool: whether 3x3 max-pooling (stride 2, padding 1) follows ReLU; without a shortcut.
            shortcut: of x's shape, added before ReLU.
            shortcut_norm: normalises the shortcut first.
            split: whether to return the result twice, so that the gradients of its two users are added as they are
                read.
        """
        if self._has_kernels(x) and (shortcut_norm is None or shortcut_norm._has_kernels(x)):
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
        views = len(self.current.positions)
        y, mean, var = batch_norm_training(
            x, self.weight, self.bias, views=views, eps=self.eps, relu=relu, shortcut=shortcut
        )
        self._track(mean, var)
        if pool:
            y = F.max_pool2d(y, 3, 2, 1)
        return (y, y) if split else (y,)

    def _has_kernels(self, x: Tensor) -> bool:
        """Whether our Triton kernels can normalise this input."""
        return x.device.type in KERNEL_DEVICES and supports(x, self.weight, self.bias, len(self.current.positions))

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / standard deviation of each view [V, C]; updates the running statistics."""
        current = self.current
        mean, rstd = batchnorm_function.operations().batchnorm_statistics(
            x.detach(),
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            len(current.positions),
            list(current.positions),
            current.total,
            current.first,
            self.momentum if self.momentum is not None else 0.1,
            self.eps,
        )
        return mean, rstd

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics from the statistics [V, C] of this forward's views.

        n views in sequence leave (1 - m)^n r + sum over views of m (1 - m)^(n - 1 - position) statistic. This is a sum,
        so the forwards of a step may come in any order; the first one applies the decay.
        """
        if self.running_mean is None:
            return
        momentum = self.momentum if self.momentum is not None else 0.1
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            if running is None:
                continue
            if self.current.first:
                running.mul_((1 - momentum) ** self.current.total)
            for position, value in zip(self.current.positions, batch.unbind(), strict=True):
                running.add_(value, alpha=momentum * (1 - momentum) ** (self.current.total - 1 - position))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(len(self.current.positions))  # no new attribute, which compiled code refuses


def _view_by_view(
    x: Tensor, views: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Call torch's kernel once per view (eager mode); the result, and mean and unbiased variance [V, C] of each
    view.
    """
    dtype = torch.promote_types(x.dtype, torch.float32) if weight is None else weight.dtype
    mean = torch.zeros(views, x.shape[1], dtype=dtype, device=x.device)
    var = torch.zeros_like(mean)
    normalised = [
        # With momentum 1 the call writes the statistics of the view into the rows it is given.
        F.batch_norm(images, mean[v], var[v], weight, bias, training=True, momentum=1.0, eps=eps)
        for v, images in enumerate(x.chunk(views))
    ]
    return torch.cat(normalised), mean, var


class ViewBatchNorm1d(ViewBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d per view."""


class ViewBatchNorm2d(ViewBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d per view."""


class ViewBatchNormAct2d(ViewBatchNorm, BatchNormAct2d):
    """timm's BatchNorm with activation, per view."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate [V * B, C, H, W]."""
        original: Any = BatchNormAct2d  # Any: timm ships no types
        y: Tensor
        if self.plain:
            y = original.forward(self, x)
        elif torch.compiler.is_compiling() and type(self.act) is nn.ReLU and isinstance(self.drop, nn.Identity):
            y = self.normalise(x, relu=True)
        else:
            y = self.act(self.drop(self.normalise(x)))
        return y


_PER_VIEW: dict[type[nn.Module], type[ViewBatchNorm]] = {
    nn.BatchNorm1d: ViewBatchNorm1d,
    nn.BatchNorm2d: ViewBatchNorm2d,
    BatchNormAct2d: ViewBatchNormAct2d,
}


def find_unbatchable(network: nn.Module) -> str | None:
    """Name and type of the first layer whose batch statistics cannot be computed per view; None if there is none.

    Such a layer is a BatchNorm of another type, or any other layer with running statistics. LayerNorm, GroupNorm and
    the like normalise images independently.
    """
    for name, module in network.named_modules():
        has_statistics = any(key.startswith("running_") for key, _ in module.named_buffers(recurse=False))
        known = type(module) in _PER_VIEW or isinstance(module, ViewBatchNorm)
        if (has_statistics or isinstance(module, _BatchNorm)) and not (known and module.momentum is not None):
            return f"{name or 'itself'} ({type(module).__name__})"
    return None


def use_view_batchnorms(network: nn.Module, current: ForwardViews) -> None:
    """Make the BatchNorms of a network normalise per view, in place; parameters, buffers and their names stay.

    Only the class of a layer changes, so that hooks and references to it stay valid.
    """
    for module in network.modules():
        per_view: Any = _PER_VIEW.get(type(module))
        if per_view is not None:
            module.__class__ = per_view
            module.current = current  # type: ignore[assignment]  # a plain object, not part of the state


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks, with the sum of their gradients."""

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
    """`torch.nn.functional.batch_norm` over the batches [B, C, ...] of all ranks; B is equal on every rank."""
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
    """Context in which every BatchNorm in training computes its statistics over the images of `ranks` ranks.

    torch's nn.SyncBatchNorm refuses CPU tensors, does not cover timm's BatchNorm with activation or stacked predictors,
    and replaces modules; this intercepts `torch.nn.functional.batch_norm`. All ranks must call the same layers in the
    same order with batches of one size. Gradients are those of the sum of the ranks' losses, which
    DistributedDataParallel's average turns into those of the mean loss.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ranks = ranks

    @staticmethod
    def active() -> SyncBatchNorm | None:
        """A context like the one that surrounds the caller; None outside of any."""
        stack_of: Any = _get_current_function_mode_stack  # untyped
        stack = stack_of()
        found = next((mode for mode in stack if isinstance(mode, SyncBatchNorm)), None)
        return None if found is None else SyncBatchNorm(found._ranks)

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
