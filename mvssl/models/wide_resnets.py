"""ResNets with all widths multiplied (resnet50x2, resnet200x2); importing this module registers them with timm.

Every layer is wider, the stem and the residual stream included, as in BYOL (arXiv 2006.07733, table 1) and in the
reference implementation. timm's wide_resnet50_2 (arXiv 1605.07146) widens only the 3x3 convolutions. Tensor names are
timm's and torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

DEPTHS = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}  # blocks per stage (arXiv 1512.03385, table 1)
FACTORS = (2, 3, 4, 5)
NAMES = tuple(f"resnet{depth}x{factor}" for depth in DEPTHS for factor in FACTORS)

default_cfgs = generate_default_cfgs(  # timm looks for this name
    {
        name: {"num_classes": 1000, "input_size": (3, 224, 224), "first_conv": "conv1", "classifier": "fc"}
        for name in NAMES
    }
)


def _wide_resnet(*, factor: int, in_chans: int = 3, **options: Any) -> ResNet:
    """timm's bottleneck ResNet with all widths times `factor`; [N, 3, S, S] to [N, 2048 * factor]."""
    width = 64 * factor
    stages = tuple(width * times for times in (1, 2, 4, 8))
    # timm's plain stem always has 64 channels, its deep one 2 * stem_width; its convolutions are replaced here.
    options |= {"channels": stages, "stem_type": "deep", "stem_width": width // 2, "in_chans": in_chans}
    model = ResNet(**options)
    stem = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as timm's
    model.add_module("conv1", stem)
    return model


def _constructor(name: str, depth: int, factor: int) -> Callable[..., ResNet]:
    """The function that timm registers under its own name."""

    def build(pretrained: bool = False, **options: Any) -> ResNet:
        model: ResNet = build_model_with_cfg(
            _wide_resnet, name, pretrained, block=Bottleneck, layers=DEPTHS[depth], factor=factor, **options
        )
        return model

    build.__name__ = build.__qualname__ = name
    return build


for _depth in DEPTHS:
    for _factor in FACTORS:
        register_model(_constructor(f"resnet{_depth}x{_factor}", _depth, _factor))
