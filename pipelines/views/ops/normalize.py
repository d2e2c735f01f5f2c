"""To float in [0, 1], and at the end to zero mean and unit variance over ImageNet."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.views.ops._device import channels
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] in any layout to float32 [N, 3, S, S] in [0, 1], one plane after the other."""
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
