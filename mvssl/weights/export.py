"""Writes a backbone for other programs: timm, torchvision, Detectron2, ONNX, torch.export."""

from __future__ import annotations

import importlib.util
import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvssl.models.backbones import ReferencePositions
from mvssl.weights.backbone_file import backbone_bytes, loading_code
from mvssl.weights.formats import to_detectron2, to_torchvision
from mvssl.weights.load import LoadedBackbone
from pipelines.files import write_whole
from pipelines.names import python_text, shell_word
from pipelines.runtime import InputError

_TOLERANCE = 1e-4
"""Largest difference of features that an exported program may show, relative to the largest feature."""


def export(loaded: LoadedBackbone, kind: str, out: Path, *, overwrite: bool = False) -> str:
    """Write a backbone to a file; returns how to use the file and what was checked.

    Args:
        loaded: the backbone, in eval mode on the CPU.
        kind: one of EXPORT_FORMATS.
        out: the file.
        overwrite: replace an existing file.

    Raises:
        InputError: the format is unknown or does not take this backbone, `out` has another ending or exists, a library
            is missing, or the exported program computes something else.
        OSError: the file cannot be written; an earlier one is untouched.
    """
    if kind not in EXPORT_FORMATS:
        raise InputError(
            f"format is {kind!r} but must be one of {', '.join(EXPORT_FORMATS)}: choose one with --format."
        )
    chosen = EXPORT_FORMATS[kind]
    if out.suffix not in chosen.endings:
        raise InputError(
            f"out is {str(out)!r} but a file of format {kind} must end in {' or '.join(chosen.endings)}: rename it."
        )
    if out.exists() and not overwrite:
        raise InputError(f"out is {str(out)!r}, which exists: add --overwrite to replace it, or name another file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    content, usage = chosen.write(loaded)
    write_whole(out, content)
    names = {'"FILE"': python_text(str(out)), "--weights FILE": f"--weights {shell_word(str(out))}", "FILE": str(out)}
    return re.sub("|".join(names), lambda found: names[found[0]], usage)


def _timm(loaded: LoadedBackbone) -> tuple[bytes, str]:
    if any("backbone." in name for name in loaded.backbone.state_dict()):
        raise InputError(
            "These weights expect another normalisation than ImageNet's, which a file for timm cannot state: name the "
            "architecture without a tag (--arch), or use them through timm itself."
        )
    content = backbone_bytes(loaded.backbone, loaded.architecture)
    usage = "; ".join(line.partition("  #")[0] for line in loading_code(loaded.architecture, "FILE"))
    if isinstance(loaded.backbone, ReferencePositions):
        own = loaded.backbone.patch_embed.img_size[0]
        usage += (
            f" (for images of {own} pixels; at other sizes timm interpolates position embeddings another way than this "
            "backbone was trained with, which --format onnx and program keep)"
        )
    return content, usage


def _torchvision(loaded: LoadedBackbone) -> tuple[bytes, str]:
    file = io.BytesIO()
    torch.save(to_torchvision(_tensors(loaded.backbone), architecture=loaded.architecture), file)
    usage = 'model.load_state_dict(torch.load("FILE"), strict=False), which leaves the classifier as it is'
    return file.getvalue(), usage


def _detectron2(loaded: LoadedBackbone) -> tuple[bytes, str]:
    tensors = to_detectron2(_tensors(loaded.backbone), architecture=loaded.architecture)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    # The heuristics add the model's own prefix, such as backbone.bottom_up.
    content = {"model": arrays, "__author__": "mvssl", "matching_heuristics": True}
    usage = "python -m tools.coco_detection --weights FILE, in a clone of mvssl, trains Mask R-CNN FPN on COCO with it"
    return pickle.dumps(content), usage


def _onnx(loaded: LoadedBackbone) -> tuple[bytes, str]:
    missing = [name for name in ("onnxscript", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"format is 'onnx', which needs {' and '.join(missing)}: pip install {' '.join(missing)}.")
    size = loaded.evaluation.crop
    exported: Any = torch.onnx.export(
        loaded.backbone,
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["features"],
    )
    content: bytes = exported.model_proto.SerializeToString()
    signature = f"ImageNet-normalised images [B, 3, {size}, {size}] to features [B, D]"
    if importlib.util.find_spec("onnxruntime") is None:
        return content, f"FILE maps {signature}; not checked: onnxruntime is not installed (pip install onnxruntime)"
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    checked = _check_program(loaded, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]))
    return content, f"FILE maps {signature}; onnxruntime {checked}"


def _program(loaded: LoadedBackbone) -> tuple[bytes, str]:
    size = loaded.evaluation.crop
    images = torch.zeros(2, 3, size, size)
    with torch.no_grad():
        program = torch.export.export(loaded.backbone, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    content = file.getvalue()
    checked = _check_program(loaded, torch.export.load(io.BytesIO(content)).module())
    return content, f'torch.export.load("FILE").module() takes images [B, 3, {size}, {size}]; it {checked}'


def _tensors(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in backbone.state_dict().items()}


def _check_program(loaded: LoadedBackbone, program: Callable[[Tensor], Tensor]) -> str:
    """Compare an exported program with the backbone on batches of one and of five images."""
    size = loaded.evaluation.crop
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for count in (1, 5):
        images = torch.randn(count, 3, size, size, generator=generator)
        with torch.no_grad():
            expected = loaded.backbone(images)
            found = program(images)
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)))
    if not worst <= _TOLERANCE:
        raise InputError(
            f"The exported program gives other features than {loaded.architecture} (largest difference "
            f"{worst:.1e} of the largest feature): export with --format timm, and report this."
        )
    return f"gives the same features (largest difference {worst:.1e} of the largest feature)"


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A file format.

    Attributes:
        endings: accepted endings of the file's name.
        write: the content of the file, and a sentence on usage with FILE for its path. Writers of libraries that were
            given a path would report a full disk in ways of their own.
    """

    endings: tuple[str, ...]
    write: Callable[[LoadedBackbone], tuple[bytes, str]]


# A new format is one function and one entry, named as in --format.
EXPORT_FORMATS = {
    "timm": ExportFormat(endings=(".safetensors",), write=_timm),
    "torchvision": ExportFormat(endings=(".pth", ".pt"), write=_torchvision),
    "detectron2": ExportFormat(endings=(".pkl",), write=_detectron2),
    "onnx": ExportFormat(endings=(".onnx",), write=_onnx),
    "program": ExportFormat(endings=(".pt2",), write=_program),
}
