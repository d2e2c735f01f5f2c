"""BatchNorm over the images of all ranks, for whatever module calls it.

torch's own nn.SyncBatchNorm refuses CPU tensors, knows neither timm's BatchNorm with activation nor stacked predictors,
and has to replace modules. This one is a mode: `torch.nn.functional.batch_norm` synchronises while it is on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


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
