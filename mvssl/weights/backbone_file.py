"""The trained backbone as a safetensors file that timm loads by itself."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import nn

from mvssl.models import small_resnets, wide_resnets
from mvssl.models.backbones import ReferencePositions
from pipelines.files import write_whole
from pipelines.names import python_text
from pipelines.runtime import InputError, describe_os_error


def backbone_bytes(backbone: nn.Module, architecture: str) -> bytes:
    """A safetensors file of a backbone's parameters and buffers under timm's names, float32, with the architecture as
    metadata; ``timm.create_model(architecture, num_classes=0, checkpoint_path=FILE)`` loads it (see `loading_code`).
    """
    tensors = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous().clone()
        for name, tensor in backbone.state_dict().items()
    }
    metadata = {"architecture": architecture, "format": "pt", "source": "mvssl"}
    if isinstance(backbone, ReferencePositions):
        metadata["pos_embed"] = "release"
    return save(tensors, metadata=metadata)


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


def loading_code(architecture: str, file: str) -> list[str]:
    """Lines of Python that load an exported backbone through timm."""
    register = [
        f"import {module.__name__}  # registers the name with timm"
        for module in (small_resnets, wide_resnets)
        if architecture in module.NAMES
    ]
    model = f"timm.create_model({python_text(architecture)}, num_classes=0, checkpoint_path={python_text(file)})"
    return ["import timm", *register, f"backbone = {model}"]
