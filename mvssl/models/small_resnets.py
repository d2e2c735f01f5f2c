"""ResNets for images of 32 to 64 pixels; importing this module registers them with timm.

The stem is a 3x3 convolution without max-pooling, as in ResNets for CIFAR (He et al., arXiv 1512.03385, section 4.2;
SimCLR, arXiv 2002.05709, appendix B.9), of stride 1, or 2 where the name says half. Everything else, tensor names
included, is timm's ResNet.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

NAMES = ("resnet10_tiny", "resnet10_half", "resnet18_small", "resnet34_small", "resnet50_small")

default_cfgs = generate_default_cfgs(  # timm looks for this name
    {
        name: {"num_classes": 1000, "input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc"}
        for name in NAMES
    }
)


class SmallResNet(ResNet):
    """A ResNet with a 3x3 stem of `width` channels and stages of `width` times 1, 2, 4 and 8; [N, 3, S, S] to [N, D].

    D is 8 * width, four times that with bottlenecks.
    """

    def __init__(self, *, width: int = 64, stem_stride: int = 1, in_chans: int = 3, **options: Any) -> None:
        stages = tuple(width * times for times in (1, 2, 4, 8))
        # timm's plain stem always has 64 channels, its deep one 2 * stem_width; its convolutions are replaced here.
        super().__init__(channels=stages, stem_type="deep", stem_width=width // 2, in_chans=in_chans, **options)
        stem = nn.Conv2d(in_chans, width, 3, stride=stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as timm's
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())


def _build(name: str, pretrained: bool, **options: Any) -> SmallResNet:
    model: SmallResNet = build_model_with_cfg(SmallResNet, name, pretrained, **options)
    return model


@register_model
def resnet10_tiny(pretrained: bool = False, **options: Any) -> SmallResNet:
    """One block per stage and a quarter of the width (16 to 128 channels): for experiments on a CPU."""
    return _build("resnet10_tiny", pretrained, block=BasicBlock, layers=(1, 1, 1, 1), width=16, **options)


@register_model
def resnet10_half(pretrained: bool = False, **options: Any) -> SmallResNet:
    """One block per stage, half the width (32 to 256 channels) and half the resolution: for photographs on a CPU."""
    return _build(
        "resnet10_half", pretrained, block=BasicBlock, layers=(1, 1, 1, 1), width=32, stem_stride=2, **options
    )


@register_model
def resnet18_small(pretrained: bool = False, **options: Any) -> SmallResNet:
    """ResNet-18 for small images."""
    return _build("resnet18_small", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **options)


@register_model
def resnet34_small(pretrained: bool = False, **options: Any) -> SmallResNet:
    """ResNet-34 for small images."""
    return _build("resnet34_small", pretrained, block=BasicBlock, layers=(3, 4, 6, 3), **options)


@register_model
def resnet50_small(pretrained: bool = False, **options: Any) -> SmallResNet:
    """ResNet-50 for small images."""
    return _build("resnet50_small", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **options)
