"""Separable Gaussian blur with a reflected border."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.views import portable_math
from pipelines.views.randomness import Slot
from pipelines.views.reference.device import update
from pipelines.views.spec import ViewSpec

_NEGLIGIBLE = 1e-8
"""Smaller weights are dropped: together they are below half a float32 rounding of a white pixel."""


def sample(spec: ViewSpec, u: Tensor) -> Tensor:
    """Sample the blur of one view from u float64 [blocks, 4, N]: sigma float32 [N] in pixels, 0 without blur."""
    low, high = spec.blur_sigma
    sigma = low + u[Slot.BLUR, 1] * (high - low)  # [N]
    return torch.where(u[Slot.BLUR, 0] < spec.blur, sigma, 0.0).to(torch.float32)


def apply(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur the images with a sigma above 0.

    Args:
        images: float32 [N, 3, S, S]; may be overwritten.
        sigma: float32 [N] on the CPU.
        kernel: taps in each direction, odd, less than 2 S.

    Returns:
        float32 [N, 3, S, S].
    """
    if not bool((sigma > 0).any()):
        return images
    taps = kernel_half(sigma.clamp(min=1e-3), kernel)  # [N, kernel // 2 + 1]
    used = int((taps > 0).any(dim=0).sum())  # weights decrease with the distance
    return update(images, sigma > 0, _blur, *taps[:, :used].unbind(dim=1))


def kernel_half(sigma: Tensor, kernel: int) -> Tensor:
    """Middle tap and those on one side: float32 [n, kernel // 2 + 1] for sigma [n] above 0.

    Weights exp(-x**2 / 2 sigma**2), normalised to sum 1 over all taps, as torchvision.
    """
    distance = torch.arange(kernel // 2 + 1, dtype=torch.float64)  # [K]
    weight = portable_math.exp(-0.5 * (distance / sigma.to(torch.float64)[:, None]) ** 2)  # [n, K]
    total = weight[:, 0]
    for k in range(1, weight.shape[1]):  # in a fixed order
        total = total + 2.0 * weight[:, k]
    weight = weight / total[:, None]
    return torch.where(weight < _NEGLIGIBLE, 0.0, weight).to(torch.float32)


def _blur(images: Tensor, *taps: Tensor) -> Tensor:
    """Blur both directions with taps [n, 1, 1, 1] each, the middle one first."""
    for _ in range(2):
        images = _down(images, taps).transpose(2, 3)
    return images


def _down(images: Tensor, taps: tuple[Tensor, ...]) -> Tensor:
    """Blur along dim 2 by sums of shifted images, so that pixels have the same bits in any batch."""
    reach, size = len(taps) - 1, images.shape[2]
    padded = F.pad(images, (0, 0, reach, reach), mode="reflect")  # [n, 3, S + 2 reach, S]
    total = padded[:, :, reach : reach + size] * taps[0]  # [n, 3, S, S]
    pair = torch.empty_like(total)
    for k in range(1, reach + 1):
        torch.add(padded[:, :, reach - k : reach - k + size], padded[:, :, reach + k : reach + k + size], out=pair)
        total += pair.mul_(taps[k])
    return total
