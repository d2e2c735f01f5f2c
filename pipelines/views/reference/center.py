"""Evaluation view: short side resized, centre cropped, normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.runtime import invalid
from pipelines.views.reference import crop_resize, normalize
from pipelines.views.spec import Interpolation

_PANORAMA = 100  # long side over short side from which only the crop of the resized image is computed


def center_views(
    batch: DecodedBatch,
    *,
    resize: int,
    crop: int,
    interpolation: Interpolation = "bicubic",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One centre crop per image, as torchvision's Resize (antialiased) and CenterCrop.

    Args:
        batch: N decoded images.
        resize: the short side becomes this many pixels.
        crop: side of the centre crop, at most `resize`.
        interpolation: of the resize.
        dtype: of the views.

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
            resized = crop_resize.resize(image, tall, wide, interpolation)  # [3, tall, wide]
            pixels[n] = resized[:, top : top + crop, left : left + crop]
        else:
            pixels[n] = _panorama(image, tall, wide, interpolation, top=top, left=left, crop=crop)
    views = normalize.apply(normalize.to_float(pixels))  # float32 [N, 3, crop, crop]
    return views.to(dtype, memory_format=torch.channels_last)


def _panorama(
    image: Tensor, tall: int, wide: int, interpolation: Interpolation, *, top: int, left: int, crop: int
) -> Tensor:
    """The crop of uint8 [3, h, w] resized to [3, tall, wide], without computing the rest: uint8 [3, crop, crop].

    As torchvision on x86 CPUs, on every device: resizes the width first and rounds in between.
    """
    _, height, width = image.shape
    if width > height:
        first, weights = part_weights(width, wide, interpolation, start=left, count=crop)
        window = image[:, :, first : first + weights.shape[1]]  # [3, h, n]
        columns = _weighted_rows(window.mT, weights).mT  # [3, h, crop]
        return crop_resize.resize(columns, tall, crop, interpolation)[:, top : top + crop]
    first, weights = part_weights(height, tall, interpolation, start=top, count=crop)
    window = image[:, first : first + weights.shape[1]]  # [3, n, w]
    narrow = crop_resize.resize(window, window.shape[1], wide, interpolation)[:, :, left : left + crop]
    return _weighted_rows(narrow, weights)


def _weighted_rows(image: Tensor, weights: Tensor) -> Tensor:
    """uint8 [3, n, w] times float64 [m, n]: uint8 [3, m, w]."""
    rows = weights.to(image.device, torch.float32) @ image.to(torch.float32)
    return rows.clamp_(0, 255).round_().to(torch.uint8)


_A = -0.5  # of the cubic kernel with antialiasing, as in torch and Pillow
_REACH = {"bicubic": 2.0, "bilinear": 1.0}  # of the kernel to each side, in pixels of the coarser grid


def part_weights(
    length: int, resized: int, interpolation: Interpolation = "bicubic", *, start: int, count: int
) -> tuple[int, Tensor]:
    """Weights of pixels `start` to `start + count - 1` of an axis resized from `length` to `resized` pixels.

    Args:
        length, resized: pixels of the whole axis before and after.
        interpolation: bicubic or bilinear.
        start, count: which of the resized pixels.

    Returns:
        The first source pixel needed, and the weights from it on: float64 [count, source pixels needed], rows sum to 1.
    """
    scale = length / resized
    stretch = max(scale, 1.0)  # antialiasing: the kernel widens when shrinking
    centers = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * scale  # [count], in source pixels
    reach = _REACH[interpolation] * stretch
    first = max(0, int(float(centers[0]) - reach))
    last = min(length, int(float(centers[-1]) + reach) + 1)
    sources = torch.arange(first, last, dtype=torch.float64) + 0.5  # [n]
    x = ((sources - centers[:, None]) / stretch).abs()  # [count, n]
    if interpolation == "bilinear":
        weights = (1 - x).clamp(min=0)
        return first, weights / weights.sum(dim=1, keepdim=True)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return first, weights / weights.sum(dim=1, keepdim=True)
