"""A backbone with a norm layer of its own kind, which cannot be computed per view in one batch."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import nn


class OwnNorm(nn.BatchNorm2d):
    """A BatchNorm that does something of its own with its batch, as far as anybody knows."""


@register_model
def mvssl_test_own_norm(pretrained: bool = False, num_classes: int = 0, **options: Any) -> nn.Module:
    """A model with a norm that nobody else knows."""
    if "dynamic_img_size" in options:
        raise TypeError(f"unexpected {options}")
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), OwnNorm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
