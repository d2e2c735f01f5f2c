"""Initial weights as the paper's release draws them, where those of timm differ."""

from __future__ import annotations

import math

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import VisionTransformer
from torch import nn


@torch.no_grad()
def redraw_as_release(backbone: nn.Module) -> None:
    """Change the weights of a new ResNet or plain vision transformer of timm to those of the paper's release, in place.

    ResNet: residual branches begin at full strength; timm lets the last norm of each begin at zero, as torchvision's
    `zero_init_residual` does. Vision transformer: the patch embedding is uniform by Glorot's rule as in MoCo v3
    (arXiv 2104.02057) with biases of zero, and the class token normal with deviation 0.02; timm draws both smaller. All
    else, and any other architecture, stays as timm draws it, by the rules that the release uses too: convolutions
    normal by He's rule over outputs, linear layers normal with deviation 0.02.
    """
    for module in backbone.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            nn.init.ones_(module.get_parameter("bn3.weight" if isinstance(module, Bottleneck) else "bn2.weight"))
    if isinstance(backbone, VisionTransformer):
        patches = backbone.patch_embed.proj
        bound = math.sqrt(6 / (patches.weight[0].numel() + patches.out_channels))
        nn.init.uniform_(patches.weight, -bound, bound)
        if patches.bias is not None:
            nn.init.zeros_(patches.bias)
        if backbone.cls_token is not None:
            nn.init.trunc_normal_(backbone.cls_token, std=0.02)
