"""The trained backbone as a safetensors file that timm loads by itself."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

from mvssl.models import small_resnets, wide_resnets
from mvssl.models.backbones import ReferencePositions
from pipelines.files import write_whole
from pipelines.runtime import InputError


def export_backbone(backbone: nn.Module, architecture: str, out: Path) -> None:
    """Write a backbone's parameters and buffers under timm's names, float32, with the architecture as metadata.

    ``timm.create_model(architecture, num_classes=0, checkpoint_path=out)`` loads it (see `loading_code`).

    Raises:
        InputError: the file cannot be written.
    """
    tensors = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous().clone()
        for name, tensor in backbone.state_dict().items()
    }
    metadata = {"architecture": architecture, "format": "pt", "source": "mvssl"}
    if isinstance(backbone, ReferencePositions):
        metadata["pos_embed"] = "release"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, save(tensors, metadata=metadata))  # save_file's files are readable by their owner only
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"The backbone could not be written to {out} ({error}): free space or choose another path."
        ) from error


def loading_code(architecture: str, file: str) -> list[str]:
    """Lines of Python that load an exported backbone through timm."""
    register = [
        f"import {module.__name__}  # registers the name with timm"
        for module in (small_resnets, wide_resnets)
        if architecture in module.NAMES
    ]
    model = f'timm.create_model("{architecture}", num_classes=0, checkpoint_path="{file}")'
    return ["import timm", *register, f"backbone = {model}"]
