"""A random box inside an image: the algorithm of torchvision's RandomResizedCrop, for crops and for cutout."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.views import exact

ATTEMPTS = 10
"""Boxes that are tried before the central fallback (torchvision's number)."""


def random_box(sizes: Tensor, u: Tensor, *, area: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """Draw one box per image as torchvision.transforms.RandomResizedCrop.get_params does.

    A box of a random share of the area and a log-uniform width / height is tried ten times; if none fits, the largest
    central box of the nearest allowed ratio is taken.

    Args:
        sizes: int64 [N, 2], (height, width).
        u: float64 [ATTEMPTS, 4, N] uniform in [0, 1): area, ratio, top and left of each attempt.
        area: range of the box's share of the area.
        ratio: range of width / height.

    Returns:
        int64 [N, 4], (top, left, height, width), inside the image and at least one pixel on a side.
    """
    height, width = sizes.to(torch.float64).unbind(dim=1)  # [N]
    target = (area[0] + u[:, 0] * (area[1] - area[0])) * (height * width)  # [10, N] pixels
    low, high = exact.log(ratio[0]), exact.log(ratio[1])
    aspect = exact.exp(low + u[:, 1] * (high - low))  # [10, N]
    w = torch.round(torch.sqrt(target * aspect))  # half to even, like Python's round
    h = torch.round(torch.sqrt(target / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)  # [10, N]
    top = torch.floor(u[:, 2] * (height - h + 1))
    left = torch.floor(u[:, 3] * (width - w + 1))
    tried = torch.stack((top, left, h, w), dim=-1)  # [10, N, 4]

    first = fits.to(torch.uint8).argmax(dim=0)  # [N], the first attempt that fits, 0 where none does
    chosen = tried[first, torch.arange(len(sizes), device=sizes.device)]  # [N, 4]
    fallback = _central(height, width, ratio)
    return torch.where(fits.any(dim=0)[:, None], chosen, fallback).to(torch.int64)


def _central(height: Tensor, width: Tensor, ratio: tuple[float, float]) -> Tensor:
    """The largest central box whose width / height lies in the range: float64 [N, 4]."""
    low, high = ratio
    aspect = width / height
    # A range without 1 may round a side of a one-pixel image to 0, which torchvision does not survive.
    h = torch.where(aspect < low, torch.round(width / low).clamp(min=1), height)
    w = torch.where(aspect > high, torch.round(height * high).clamp(min=1), width)
    top = torch.floor((height - h) / 2)
    left = torch.floor((width - w) / 2)
    return torch.stack((top, left, h, w), dim=-1)
