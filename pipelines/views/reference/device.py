"""Helpers of the operations: optional Triton, asynchronous uploads, updates of selected images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the reference backend works without
    triton, tl = None, None

__all__ = ["jit", "tl", "triton"]


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function itself, which is then never called."""
    return function if triton is None else triton.jit(function)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; to a GPU through pinned memory, ordered in the current stream."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned block until the copy is done


@cache
def channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """One constant per channel, [3, 1, 1]; cached per device and dtype, read-only."""
    with torch.inference_mode(False):  # a tensor made in inference mode could never be used by autograd
        return torch.tensor(values, device=device, dtype=dtype)[:, None, None]


def update(images: Tensor, chosen: Tensor, function: Callable[..., Tensor], *per_image: Tensor) -> Tensor:
    """Replace selected images by `function(images, *per_image)`.

    Args:
        images: [N, 3, S, S]; may be overwritten.
        chosen: bool [N] on the CPU.
        function: receives the selected images [n, 3, S, S] and their rows of `per_image`, as [n, 1, 1, 1] on the
            device; returns as many images.
        per_image: one number per image each, [N] on the CPU.

    Returns:
        [N, 3, S, S].
    """
    where = chosen.nonzero().squeeze(1)  # [n]
    if len(where) == 0:
        return images
    numbers: tuple[Tensor, ...] = ()
    if per_image:  # [K, n]: one copy for all
        rows = torch.stack([values[where].to(images.dtype) for values in per_image])
        numbers = upload(rows, images.device)[..., None, None, None].unbind()  # [n, 1, 1, 1] each
    if len(where) == len(images):
        return function(images, *numbers)
    where = upload(where, images.device)
    return images.index_copy_(0, where, function(images.index_select(0, where), *numbers))
