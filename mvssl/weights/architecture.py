"""Which timm architecture a backbone's tensors belong to, told from their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# Blocks a stage of the ResNets (He et al., arXiv 1512.03385, table 1), by whether their blocks are bottlenecks.
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (True, (3, 24, 36, 3)): "resnet200",
}
# Width and depth of the vision transformers (Dosovitskiy et al., arXiv 2010.11929, table 1; DeiT's for tiny and small).
_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}


def guess_architecture(tensors: Mapping[str, Tensor]) -> str | None:
    """timm's name of the architecture with these tensors (names of timm); None for one that is not known here.

    Widened ResNets are told by the width of the bottleneck: wide_resnet50_2 has 128 where resnet50 has 64.
    """
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        return _resnet(tensors)
    if "patch_embed.proj.weight" in tensors and "cls_token" in tensors:
        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        size = _VITS.get((width, depth))
        tokens = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0
        grid = round(max(tokens - 1, 0) ** 0.5)
        return f"vit_{size}_patch{patch}_{grid * patch}" if size and grid * grid == tokens - 1 else None
    return None


def _resnet(tensors: Mapping[str, Tensor]) -> str | None:
    blocks = tuple(
        len({found[1] for name in tensors if (found := re.match(rf"layer{stage}\.(\d+)\.", name))})
        for stage in (1, 2, 3, 4)
    )
    bottleneck = "layer1.0.conv3.weight" in tensors
    width = tensors["layer1.0.conv1.weight"].shape[0]
    if tensors["conv1.weight"].shape[2:] != (7, 7) or width not in (64, 128):
        return None
    name = _RESNETS.get((bottleneck, blocks))
    if name is None or width == 64:
        return name
    return f"wide_{name}_2" if name in ("resnet50", "resnet101") else None
