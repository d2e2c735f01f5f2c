"""A part of a bicubic antialiased resize along one axis, without making the rest of it."""

from __future__ import annotations

import torch
from torch import Tensor

_A = -0.5  # of the cubic kernel with antialiasing, as in torch and Pillow
_REACH = 2.0  # of the kernel to each side, in pixels of the coarser grid


def part_weights(length: int, resized: int, *, start: int, count: int) -> tuple[int, Tensor]:
    """Weights that make pixels `start` to ``start + count - 1`` of an axis resized from `length` to `resized` pixels.

    Args:
        length, resized: pixels of the whole axis before and after.
        start, count: which of the resized pixels.

    Returns:
        The first source pixel needed, and the weights from it on: float64 [count, source pixels needed], rows sum to 1.
    """
    scale = length / resized
    stretch = max(scale, 1.0)  # the kernel widens when shrinking: that is the antialiasing
    centers = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * scale  # [count], in source pixels
    first = max(0, int(float(centers[0]) - _REACH * stretch))
    last = min(length, int(float(centers[-1]) + _REACH * stretch) + 1)
    sources = torch.arange(first, last, dtype=torch.float64) + 0.5  # [n]
    x = ((sources - centers[:, None]) / stretch).abs()  # [count, n]
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return first, weights / weights.sum(dim=1, keepdim=True)
