"""In-place updates of lists of tensors by a factor on the device, which torch's foreach functions do not offer.

On CUDA a few launches for all tensors, with a temporary copy; on the CPU one pass over each tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def lerp_(tensors: list[Tensor], ends: list[Tensor], weight: Tensor) -> None:
    """Interpolate each tensor towards its end, in place: t = t + weight * (end - t).

    Args:
        tensors, ends: of equal shapes, on one device.
        weight: scalar on that device; the host never reads it.
    """
    if tensors and tensors[0].is_cuda:
        foreach_lerp_(tensors, ends, weight)
    else:
        for tensor, end in zip(tensors, ends, strict=True):
            tensor.lerp_(end, weight.to(tensor.dtype))


@torch.no_grad()
def subtract_(tensors: list[Tensor], others: list[Tensor], factor: Tensor) -> None:
    """t = t - factor * other, in place; arguments as for `lerp_`."""
    if tensors and tensors[0].is_cuda:
        foreach_subtract_(tensors, others, factor)
    else:
        for tensor, other in zip(tensors, others, strict=True):
            tensor.addcmul_(other, factor, value=-1)


def foreach_lerp_(tensors: list[Tensor], ends: list[Tensor], weight: Tensor) -> None:
    """`lerp_` in a few launches; t * (1 - w) + end * w would drift, as its factors do not sum to 1 in float32."""
    step = torch._foreach_sub(ends, tensors)
    torch._foreach_mul_(step, weight)
    torch._foreach_add_(tensors, step)


def foreach_subtract_(tensors: list[Tensor], others: list[Tensor], factor: Tensor) -> None:
    """`subtract_` in a few launches."""
    torch._foreach_sub_(tensors, torch._foreach_mul(others, factor))
