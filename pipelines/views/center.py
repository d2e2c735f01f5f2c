"""The view for evaluation: short side resized, centre cropped, normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.errors import invalid
from pipelines.views.cubic import part_weights
from pipelines.views.ops import crop_resize, normalize

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
