"""The view for evaluation: short side resized, centre cropped, normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.errors import invalid
from pipelines.views.ops import crop_resize, normalize


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
        short = min(height, width)
        tall, wide = resize * height // short, resize * width // short
        top, left = round((tall - crop) / 2), round((wide - crop) / 2)
        resized = crop_resize.resize(batch.image(n).permute(2, 0, 1), tall, wide)  # [3, tall, wide]
        pixels[n] = resized[:, top : top + crop, left : left + crop]
    views = normalize.apply(normalize.to_float(pixels))  # float32 [N, 3, crop, crop]
    return views.to(dtype, memory_format=torch.channels_last)
