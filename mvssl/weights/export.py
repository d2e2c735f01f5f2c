"""A backbone as files of other programs. A new format is one function and one entry of FORMATS."""

from __future__ import annotations

import importlib.util
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mvssl.weights.backbone_file import export_backbone, loading_code
from mvssl.weights.formats import to_detectron2, to_torchvision
from mvssl.weights.load import Measured
from pipelines.runtime import InputError

_TOLERANCE = 1e-4
"""Largest difference of features, as a share of the largest one, that a program in another runtime may have."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One kind of file.

    Attributes:
        endings: which the file's name may have.
        write: writes a backbone to a path and says, in a sentence, how it is used and what was checked.
    """

    endings: tuple[str, ...]
    write: Callable[[Measured, Path], str]


def export(measured: Measured, kind: str, out: Path, *, overwrite: bool = False) -> str:
    """Write a backbone; gives a sentence on how it is used.

    Args:
        measured: the backbone, in eval mode on the CPU.
        kind: one of FORMATS.
        out: the file.
        overwrite: replace a file that is there.

    Raises:
        InputError: the format is unknown or does not take this backbone, the file's ending is another, it is there
            already, something is not installed, or the written program computes something else.
        OSError: it cannot be written; an earlier file of that name is untouched then.
    """
    if kind not in FORMATS:
        raise InputError(f"format is {kind!r} but must be one of {', '.join(FORMATS)}: choose one with --format.")
    form = FORMATS[kind]
    if out.suffix not in form.endings:
        raise InputError(
            f"out is {str(out)!r} but a file of format {kind} ends in {' or '.join(form.endings)}: name it so."
        )
    if out.exists() and not overwrite:
        raise InputError(f"out is {str(out)!r}, which exists: add --overwrite to replace it, or name another file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.stem}.writing{out.suffix}")
    try:
        said = form.write(measured, aside)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return said.replace("FILE", str(out))


def _timm(measured: Measured, out: Path) -> str:
    if any("backbone." in name for name in measured.backbone.state_dict()):
        raise InputError(
            "These weights are for images that are normalised otherwise than ImageNet's, which a file for timm cannot "
            "say: name the architecture without a tag (--arch), or use them through timm itself."
        )
    export_backbone(measured.backbone, measured.architecture, out)
    return "; ".join(line.partition("  #")[0] for line in loading_code(measured.architecture, "FILE"))


def _torchvision(measured: Measured, out: Path) -> str:
    tensors = to_torchvision(_tensors(measured.backbone), architecture=measured.architecture)
    torch.save(tensors, out)
    return 'model.load_state_dict(torch.load("FILE"), strict=False), where the classifier stays as it is'


def _detectron2(measured: Measured, out: Path) -> str:
    tensors = to_detectron2(_tensors(measured.backbone), architecture=measured.architecture)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    # The heuristics put what the model has in front of these names, such as backbone.bottom_up.
    held = {"model": arrays, "__author__": "mvssl", "matching_heuristics": True}
    out.write_bytes(pickle.dumps(held))
    return "python -m tools.coco_detection --weights FILE trains Mask R-CNN FPN on COCO with it"


def _onnx(measured: Measured, out: Path) -> str:
    _need("onnxscript", "onnx")
    size = measured.evaluation.crop
    images = torch.zeros(2, 3, size, size)
    torch.onnx.export(
        measured.backbone,
        (images,),
        str(out),
        dynamo=True,
        external_data=False,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["features"],
    )
    how = f"images [B, 3, {size}, {size}], normalised as for ImageNet, to features [B, D]"
    if importlib.util.find_spec("onnxruntime") is None:
        return f"FILE takes {how}; not checked, as onnxruntime is not installed (pip install onnxruntime)"
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    said = _checked(measured, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]))
    return f"FILE takes {how}; onnxruntime {said}"


def _program(measured: Measured, out: Path) -> str:
    size = measured.evaluation.crop
    images = torch.zeros(2, 3, size, size)
    with torch.no_grad():
        program = torch.export.export(measured.backbone, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, out)
    loaded = torch.export.load(out).module()
    said = _checked(measured, loaded)
    return f'torch.export.load("FILE").module() takes images [B, 3, {size}, {size}]; it {said}'


FORMATS = {
    "timm": Format(endings=(".safetensors",), write=_timm),
    "torchvision": Format(endings=(".pth", ".pt"), write=_torchvision),
    "detectron2": Format(endings=(".pkl",), write=_detectron2),
    "onnx": Format(endings=(".onnx",), write=_onnx),
    "program": Format(endings=(".pt2",), write=_program),
}
"""What a backbone can be written as, by the name of --format."""


def _tensors(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in backbone.state_dict().items()}


def _checked(measured: Measured, program: Callable[[Tensor], Tensor]) -> str:
    """Compare with the backbone on batches of one and of five images.

    Raises:
        InputError: the features differ.
    """
    size = measured.evaluation.crop
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for count in (1, 5):
        images = torch.randn(count, 3, size, size, generator=generator)
        with torch.no_grad():
            expected = measured.backbone(images)
            found = program(images)
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)))
    if not worst <= _TOLERANCE:
        raise InputError(
            f"The exported program gives other features than {measured.architecture} (largest difference "
            f"{worst:.1e} of the largest feature): export with --format timm, and report this."
        )
    return f"gives the same features (largest difference {worst:.1e} of the largest feature)"


def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"format is 'onnx', which needs {' and '.join(missing)}: pip install {' '.join(missing)}.")
