"""Small numbers from the host to the device, without the host waiting for the device's queue.

Triton where it is installed, so that files with device functions can be imported everywhere.

Apply a function to those images of a batch that were chosen.
"""

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
    """`triton.jit`; without Triton the function itself, which nobody calls then."""
    return function if triton is None else triton.jit(function)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; to a GPU by way of pinned memory, in the current stream's order."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned block until it is copied


@cache
def channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """One constant per channel, [3, 1, 1]; made once per device and dtype, not to be written to."""
    with torch.inference_mode(False):  # or a first use in inference mode would bar it from autograd for ever
        return torch.tensor(values, device=device, dtype=dtype)[:, None, None]


def update(images: Tensor, chosen: Tensor, function: Callable[..., Tensor], *per_image: Tensor) -> Tensor:
    """Replace the chosen images by `function(images, *per_image)`.

    Args:
        images: [N, 3, S, S]; may be overwritten.
        chosen: bool [N] on the CPU.
        function: gets the chosen images [n, 3, S, S] and the rows of `per_image` that belong to them, as
            [n, 1, 1, 1] on the images' device; must return as many images.
        per_image: one number per image each, [N] on the CPU.

    Returns:
        [N, 3, S, S].
    """
    where = chosen.nonzero().squeeze(1)  # [n]
    if len(where) == 0:
        return images
    numbers: tuple[Tensor, ...] = ()
    if per_image:  # [K, n], so that one copy takes them all
        rows = torch.stack([values[where].to(images.dtype) for values in per_image])
        numbers = upload(rows, images.device)[..., None, None, None].unbind()  # [n, 1, 1, 1] each
    if len(where) == len(images):
        return function(images, *numbers)
    where = upload(where, images.device)
    return images.index_copy_(0, where, function(images.index_select(0, where), *numbers))
