"""Random resized crop with horizontal flip: decoded images of any size to square uint8 views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.views.randomness import ATTEMPTS, Slot, random_box
from pipelines.views.spec import Interpolation, ViewSpec

_CUDA_FACTOR = 32
"""Torch's antialiased CUDA kernel runs out of shared memory (48 KiB) when it shrinks by more than about 46."""


def sample(spec: ViewSpec, sizes: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Sample the crops and flips of one view.

    Args:
        spec: the view.
        sizes: int64 [N, 2], (height, width) of the images.
        u: float64 [blocks, 4, N] uniform in [0, 1).

    Returns:
        crop int64 [N, 4] (top, left, height, width), the whole image if the spec has no area; flip bool [N].
    """
    flip = u[Slot.FLIP, 0] < spec.flip
    if spec.area is None:
        return torch.cat((torch.zeros_like(sizes), sizes), dim=1), flip
    return random_box(sizes, u[Slot.CROP : Slot.CROP + ATTEMPTS], area=spec.area, ratio=spec.ratio), flip


def apply(
    images: Sequence[Tensor], crop: Tensor, flip: Tensor, size: int, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Crop, resize (antialiased, rounded to uint8) and flip.

    Args:
        images: N images uint8 [H, W, 3].
        crop: int64 [N, 4] on the CPU.
        flip: bool [N] on the CPU.
        size: S.
        interpolation: of the resize.

    Returns:
        uint8 [N, 3, S, S], channels-last.
    """
    views = torch.empty(
        (len(images), 3, size, size),
        dtype=torch.uint8,
        device=images[0].device,
        memory_format=torch.channels_last,
    )
    for view, image, (top, left, height, width), mirror in zip(
        views, images, crop.tolist(), flip.tolist(), strict=True
    ):
        window = image[top : top + height, left : left + width].permute(2, 0, 1)  # [3, h, w]
        resized = resize(window, size, size, interpolation)
        view.copy_(resized.flip(2) if mirror else resized)
    return views


def resize(image: Tensor, height: int, width: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """Antialiased resize of one uint8 image [3, h, w], as torchvision: uint8 [3, height, width].

    On CUDA, an image that shrinks by more than 32 in a direction is resized on the CPU.
    """
    if image.device.type == "cuda" and max(image.shape[1] / height, image.shape[2] / width) > _CUDA_FACTOR:
        return resize(image.cpu(), height, width, interpolation).to(image.device)
    native = image.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    source = image[None] if native else image[None].to(torch.float32)  # [1, 3, h, w]
    resized = F.interpolate(source, size=(height, width), mode=interpolation, align_corners=False, antialias=True)
    if not native:  # cubic weights overshoot
        resized = resized.clamp_(0, 255).round_().to(torch.uint8)
    return resized[0]
