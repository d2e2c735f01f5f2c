"""The trained backbone as a safetensors file that timm loads by itself."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mvssl.models.small_resnets import NAMES
from pipelines.runtime import InputError


def export_backbone(backbone: nn.Module, architecture: str, out: Path) -> None:
    """Write a backbone's parameters and buffers under timm's own names, float32, contiguous.

    ``timm.create_model(architecture, num_classes=0, checkpoint_path=out)`` loads it (`loading_code`).
    The metadata names the architecture.

    Raises:
        InputError: the file cannot be written.
    """
    tensors = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous().clone()
        for name, tensor in backbone.state_dict().items()
    }
    aside = out.with_name(f".{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:  # not save_file, which makes files that only their owner can read
            file.write(save(tensors, metadata={"architecture": architecture, "format": "pt", "source": "mvssl"}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, out)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise InputError(
            f"The backbone could not be written to {out} ({error}): free space or choose another path."
        ) from error


def loading_code(architecture: str, file: str) -> list[str]:
    """Lines of Python that load an exported backbone in a program that does not use mvssl otherwise."""
    own = ["import mvssl.models.small_resnets  # so that timm knows the name"] if architecture in NAMES else []
    model = f'timm.create_model("{architecture}", num_classes=0, checkpoint_path="{file}")'
    return ["import timm", *own, f"backbone = {model}"]


def read_backbone(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Read an exported backbone: its architecture and its tensors.

    Raises:
        InputError: it is missing, damaged, or was not written by mvssl.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as an exported backbone ({error}): give a .safetensors file."
        ) from error
    if "architecture" not in metadata:
        raise InputError(f"{path} does not name its architecture: give a file written by mvssl-train or mvssl-export.")
    return metadata["architecture"], tensors


def load_backbone(backbone: nn.Module, path: Path, *, architecture: str) -> None:
    """Load an exported backbone's weights into `backbone`.

    Raises:
        InputError: it is of another architecture or its tensors do not fit.
    """
    found, tensors = read_backbone(path)
    if found != architecture:
        raise InputError(
            f"{path} holds a {found} but the recipe's backbone is {architecture}: set --backbone.name {found}."
        )
    try:
        backbone.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit {architecture} ({str(error).splitlines()[-1].strip()}): export it anew."
        ) from error
