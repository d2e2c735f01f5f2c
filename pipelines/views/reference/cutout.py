"""Cutout: one box of a view filled with the ImageNet mean."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.views.randomness import ATTEMPTS, Slot, random_box
from pipelines.views.reference.device import channels, jit, tl, update
from pipelines.views.spec import IMAGENET_MEAN, ViewSpec


def sample(spec: ViewSpec, u: Tensor) -> Tensor:
    """Sample the boxes of one view from u float64 [blocks, 4, N]: int64 [N, 4], zeros if the spec has no cutout."""
    count = u.shape[-1]
    if spec.cutout is None:
        return torch.zeros((count, 4), dtype=torch.int64, device=u.device)
    sizes = torch.full((count, 2), spec.size, device=u.device)
    return random_box(sizes, u[Slot.CUTOUT : Slot.CUTOUT + ATTEMPTS], area=spec.cutout, ratio=spec.cutout_ratio)


def apply(images: Tensor, box: Tensor) -> Tensor:
    """Fill each image's box.

    Args:
        images: float32 [N, 3, S, S] in [0, 1]; may be overwritten.
        box: int64 [N, 4] on the CPU, (top, left, height, width); height 0 for no box.

    Returns:
        float32 [N, 3, S, S].
    """
    top, left, height, width = box.unbind(dim=1)  # [N]
    return update(images, height > 0, _fill, top, left, top + height, left + width)


def _fill(images: Tensor, top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
    """Fill boxes given by edges [n, 1, 1, 1]."""
    at = torch.arange(images.shape[-1], device=images.device)
    row, column = at[:, None], at  # [S, 1], [S]
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)  # [n, 1, S, S]
    mean = channels(IMAGENET_MEAN, images.device, images.dtype)  # [3, 1, 1]
    return torch.where(inside, mean, images)


@jit
def cutout_device(
    red: tl.tensor,
    green: tl.tensor,
    blue: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    top: tl.tensor,
    left: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
) -> tl.tensor:
    """As `apply`, for the channels of pixels at rows y and columns x of one image."""
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    red = tl.where(inside, 0.485, red)
    green = tl.where(inside, 0.456, green)
    blue = tl.where(inside, 0.406, blue)
    return red, green, blue
