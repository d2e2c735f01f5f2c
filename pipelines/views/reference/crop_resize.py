"""Random resized crop with horizontal flip: from decoded images of any size to square uint8 views.

The view for evaluation: short side resized, centre cropped, normalised.

A part of a bicubic antialiased resize along one axis, without making the rest of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.batch import DecodedBatch
from pipelines.runtime import invalid
from pipelines.views.randomness import ATTEMPTS, Slot, random_box
from pipelines.views.reference import crop_resize, normalize
from pipelines.views.spec import ViewSpec

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


_PANORAMA = 100  # long side over short side from which the resized image outside the crop is not made


def center_views(batch: DecodedBatch, *, resize: int, crop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make one central view per image, as torchvision's Resize (bicubic, antialiased) and CenterCrop.

    Args:
        batch: N decoded images.
        resize: the short side becomes this many pixels.
        crop: side of the central square that is cut then, at most `resize`.
        dtype: type of the views.

    Returns:
        [N, 3, crop, crop], channels-last, normalised, on the batch's device.

    Raises:
        InputError: `crop` is not between 1 and `resize`.
    """
    if not 1 <= crop <= resize:
        raise invalid("crop", crop, f"between 1 and resize ({resize})", "lower crop or raise resize")
    pixels = torch.empty(
        (len(batch), 3, crop, crop), dtype=torch.uint8, device=batch.device, memory_format=torch.channels_last
    )
    for n, (height, width) in enumerate(batch.sizes.tolist()):
        image = batch.image(n).permute(2, 0, 1)  # [3, height, width]
        short = min(height, width)
        tall, wide = resize * height // short, resize * width // short
        top, left = round((tall - crop) / 2), round((wide - crop) / 2)
        if max(height, width) < _PANORAMA * short:
            resized = crop_resize.resize(image, tall, wide)  # [3, tall, wide]
            pixels[n] = resized[:, top : top + crop, left : left + crop]
        else:
            pixels[n] = _panorama(image, tall, wide, top=top, left=left, crop=crop)
    views = normalize.apply(normalize.to_float(pixels))  # float32 [N, 3, crop, crop]
    return views.to(dtype, memory_format=torch.channels_last)


def _panorama(image: Tensor, tall: int, wide: int, *, top: int, left: int, crop: int) -> Tensor:
    """The crop of uint8 [3, h, w] resized to [3, tall, wide], without making the rest: uint8 [3, crop, crop].

    As torchvision on x86 CPUs, on every device: resizes the width first and rounds in between.
    """
    _, height, width = image.shape
    if width > height:
        first, weights = part_weights(width, wide, start=left, count=crop)
        window = image[:, :, first : first + weights.shape[1]]  # [3, h, n]
        columns = _weighted_rows(window.mT, weights).mT  # [3, h, crop]
        return crop_resize.resize(columns, tall, crop)[:, top : top + crop]
    first, weights = part_weights(height, tall, start=top, count=crop)
    window = image[:, first : first + weights.shape[1]]  # [3, n, w]
    narrow = crop_resize.resize(window, window.shape[1], wide)[:, :, left : left + crop]
    return _weighted_rows(narrow, weights)


def _weighted_rows(image: Tensor, weights: Tensor) -> Tensor:
    """uint8 [3, n, w] times float64 [m, n]: uint8 [3, m, w]."""
    rows = weights.to(image.device, torch.float32) @ image.to(torch.float32)
    return rows.clamp_(0, 255).round_().to(torch.uint8)


_CUDA_FACTOR = 32
"""Torch's antialiased CUDA kernel runs out of shared memory (48 KiB) when it shrinks by more than about 46."""


def draw(spec: ViewSpec, sizes: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the crops and flips of one view.

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


def apply(images: Sequence[Tensor], crop: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop, resize (bicubic, antialiased, rounded to uint8) and flip.

    Args:
        images: N images uint8 [H, W, 3].
        crop: int64 [N, 4] on the CPU.
        flip: bool [N] on the CPU.
        size: S.

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
        resized = resize(window, size, size)
        view.copy_(resized.flip(2) if mirror else resized)
    return views


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic antialiased resize of one uint8 image [3, h, w], as torchvision: uint8 [3, height, width].

    On CUDA, an image that shrinks by more than 32 in a direction is resized on the CPU.
    """
    if image.device.type == "cuda" and max(image.shape[1] / height, image.shape[2] / width) > _CUDA_FACTOR:
        return resize(image.cpu(), height, width).to(image.device)
    native = image.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    source = image[None] if native else image[None].to(torch.float32)  # [1, 3, h, w]
    resized = F.interpolate(source, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    if not native:  # cubic weights overshoot
        resized = resized.clamp_(0, 255).round_().to(torch.uint8)
    return resized[0]
