"""Conversion to float in [0, 1], and normalisation by the ImageNet mean and standard deviation."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.views.reference.device import channels, jit, tl
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] in any layout to float32 [N, 3, S, S] in [0, 1], channel planes contiguous."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).mul_(1.0 / 255.0)


def apply(images: Tensor) -> Tensor:
    """Normalise float32 [N, 3, S, S] in [0, 1] by the ImageNet mean and standard deviation of each channel."""
    mean = channels(IMAGENET_MEAN, images.device, images.dtype)  # [3, 1, 1]
    std = channels(IMAGENET_STD, images.device, images.dtype)
    return (images - mean).div_(std)


def undo(images: Tensor) -> Tensor:
    """Back from normalised [N, 3, S, S] in any float type to uint8 [N, 3, S, S], for pictures."""
    mean = channels(IMAGENET_MEAN, images.device, torch.float32)  # [3, 1, 1]
    std = channels(IMAGENET_STD, images.device, torch.float32)
    return (images.float() * std + mean).mul_(255.0).round_().clamp_(0, 255).to(torch.uint8)


@jit
def to_float_device(value: tl.tensor) -> tl.tensor:
    """As `to_float`, for one channel of pixels."""
    return value.to(tl.float32) * 0.00392156862745098


@jit
def normalize_device(red: tl.tensor, green: tl.tensor, blue: tl.tensor) -> tl.tensor:
    """As `apply`, for the channels of pixels."""
    red = tl.div_rn(red - 0.485, 0.229)
    green = tl.div_rn(green - 0.456, 0.224)
    blue = tl.div_rn(blue - 0.406, 0.225)
    return red, green, blue
