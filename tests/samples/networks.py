"""Small backbones; importing this module registers two of them with timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

NAME = "mvssl_test_two_convolutions"
default_cfgs = generate_default_cfgs(  # timm looks for this name
    {NAME: {"num_classes": 0, "input_size": (3, 32, 32), "first_conv": "features.0", "classifier": "head"}}
)


class TwoConvolutions(nn.Module):
    """[N, 3, S, S] to [N, 16]."""

    def __init__(self, num_classes: int = 0, in_chans: int = 3, **_: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((in_chans, 8), (8, 16)):
            layers += [nn.Conv2d(before, after, 3, stride=2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Identity()
        self.num_features = 16
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return features


@register_model
def mvssl_test_two_convolutions(pretrained: bool = False, **options: Any) -> nn.Module:
    if "dynamic_img_size" in options:
        raise TypeError(f"unexpected {options}")
    model: nn.Module = build_model_with_cfg(TwoConvolutions, NAME, pretrained, **options)
    return model


class OwnNorm(nn.BatchNorm2d):
    """A norm of an unknown type: mvssl must assume that its batch statistics cannot be computed per view."""


@register_model
def mvssl_test_own_norm(pretrained: bool = False, num_classes: int = 0, **options: Any) -> nn.Module:
    if "dynamic_img_size" in options:
        raise TypeError(f"unexpected {options}")
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), OwnNorm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Brightness(nn.Module):
    """[B, 3, S, S] -> [B, 2], a direction that encodes the mean brightness."""

    def forward(self, view: Tensor) -> Tensor:
        angle = view.mean(dim=(1, 2, 3))  # [B]
        return torch.stack([angle.cos(), angle.sin()], dim=1)
