"""The trained backbone as a safetensors file that timm loads by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mvssl.models import small_resnets, wide_resnets
from mvssl.models.backbones import ReferencePositions, input_normalisation
from pipelines.files import write_whole
from pipelines.names import python_text
from pipelines.runtime import InputError, describe_os_error


def backbone_bytes(backbone: nn.Module, architecture: str) -> bytes:
    """A safetensors file of a backbone's parameters and buffers under timm's names, float32, with the architecture as
    metadata; ``timm.create_model(architecture, num_classes=0, checkpoint_path=FILE)`` loads it (see `loading_code`).
    """
    metadata = {"architecture": architecture, "format": "pt", "source": "mvssl"}
    if isinstance(backbone, ReferencePositions):
        metadata["pos_embed"] = "release"
    if (own := input_normalisation(backbone)) is not None:
        metadata |= {"mean": json.dumps(own[0]), "std": json.dumps(own[1])}
    if (heads := head_count(backbone, architecture)) is not None:
        metadata["num_heads"] = str(heads)
    return save(float_tensors(backbone), metadata=metadata)


def metadata_normalisation(metadata: Mapping[str, str]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of the images that the backbone of a file takes; None if it does not say."""
    try:
        mean, std = (tuple(map(float, json.loads(metadata[name]))) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        return None
    usable = len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std))) and min(std) > 0
    return (mean, std) if usable else None


def float_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU, float32 where they are numbers of any precision."""
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous().clone()
        for name, tensor in backbone.state_dict().items()
    }


def head_count(backbone: nn.Module, architecture: str) -> int | None:
    """Attention heads of a vision transformer where they are not those of timm's architecture, else None.

    Tensors do not tell them: with another number the same weights give other features (MoCo v3's small one has 12).
    """
    if not isinstance(backbone, VisionTransformer):
        return None
    with torch.device("meta"):
        timms: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
    ours: int = backbone.get_submodule("blocks.0.attn").num_heads  # type: ignore[assignment]
    return None if ours == timms.blocks[0].attn.num_heads else ours


def export_backbone(backbone: nn.Module, architecture: str, out: Path) -> None:
    """Write `backbone_bytes` to a file.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, backbone_bytes(backbone, architecture))
    except OSError as error:
        raise InputError(f"The backbone could not be written to {out}: {describe_os_error(error)}") from error


def loading_code(
    architecture: str,
    file: str,
    *,
    heads: int | None = None,
    own: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> list[str]:
    """Lines of Python that load an exported backbone through timm.

    Args:
        architecture: timm's name.
        file: the exported file.
        heads: as by `head_count`.
        own: mean and standard deviation of the images that it takes, if they are not ImageNet's.
    """
    register = [
        f"import {module.__name__}  # registers the name with timm"
        for module in (small_resnets, wide_resnets)
        if architecture in module.NAMES
    ]
    options = "num_classes=0" + (f", num_heads={heads}" if heads is not None else "")
    model = f"timm.create_model({python_text(architecture)}, {options}, checkpoint_path={python_text(file)})"
    images = [] if own is None else [f"# takes images (RGB of 0 to 1) normalised by mean {own[0]} and std {own[1]}"]
    return ["import timm", *register, f"backbone = {model}", *images]
