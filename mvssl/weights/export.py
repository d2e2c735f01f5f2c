"""Writes a backbone for other programs: timm and its hub, torchvision, Detectron2, ONNX, torch.export."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvssl.models.backbones import ReferencePositions
from mvssl.weights.backbone_file import backbone_bytes, head_count, loading_code
from mvssl.weights.formats import to_detectron2, to_torchvision
from mvssl.weights.load import LoadedBackbone, own_normalisation
from mvssl.weights.timm_folder import CARD, CONFIG, WEIGHTS, CardFields, folder_files
from pipelines.files import locked, sync_folder, temporary_path, whole_file, write_whole
from pipelines.names import python_text, shell_word
from pipelines.runtime import InputError

_TOLERANCE = 1e-4
"""Largest difference of features that an exported program may show, relative to the largest feature."""


def export(
    loaded: LoadedBackbone, kind: str, out: Path, *, overwrite: bool = False, card: CardFields | None = None
) -> str:
    """Write a backbone to a file or folder; returns how to use it and what was checked.

    Args:
        loaded: the backbone, in eval mode on the CPU.
        kind: one of EXPORT_FORMATS.
        out: the file, or the folder of format timm-folder.
        overwrite: replace an existing file, or the files of that name in a folder.
        card: what the model card of a folder states.

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
    if chosen.endings and out.suffix not in chosen.endings:
        raise InputError(
            f"out is {str(out)!r} but a file of format {kind} must end in {' or '.join(chosen.endings)}: rename it."
        )
    if os.path.lexists(out) and not overwrite:
        raise InputError(f"out is {str(out)!r}, which exists: add --overwrite to replace it, or name another file.")
    if not chosen.endings and os.path.lexists(out):
        _check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    content, usage = chosen.write(loaded, card or CardFields())
    if isinstance(content, bytes):
        write_whole(out, content)
    else:
        _write_folder(out, content)
    names = {'"FILE"': python_text(str(out)), "--weights FILE": f"--weights {shell_word(str(out))}", "FILE": str(out)}
    return re.sub("|".join(names), lambda found: names[found[0]], usage)


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder in which files of other names would be left among the new ones."""
    if not folder.is_dir():
        raise InputError(f"out is {str(folder)!r}, a file, but format timm-folder writes a folder: name another one.")
    own = {name for file in (CONFIG, WEIGHTS, CARD) for name in (file, temporary_path(Path(file)).name)}
    others = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if others:
        raise InputError(
            f"out is {str(folder)!r}, a folder with other files ({', '.join(others[:3])}), which would lie among the "
            "exported ones: name another folder."
        )


def _write_folder(folder: Path, content: Mapping[str, bytes]) -> None:
    """Write a folder's files, all or none; what a killed export has left is written again."""
    if folder.is_dir():
        with ExitStack() as stack:  # all are written before the first one is published
            for name, data in content.items():
                stack.enter_context(whole_file(folder / name)).write_bytes(data)
        return
    temporary = temporary_path(folder)
    temporary.mkdir(exist_ok=True)
    with locked(temporary, f"Another process is writing {folder}: wait for it, or choose another place."):
        try:
            for name, data in content.items():
                write_whole(temporary / name, data)
            temporary.rename(folder)
        except BaseException:  # and not after the rename: the name may be another process's by then
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    sync_folder(folder.parent)


def _timm_folder(loaded: LoadedBackbone, card: CardFields) -> tuple[dict[str, bytes], str]:
    files = folder_files(loaded, card)
    usage = f"import timm; backbone = timm.create_model({python_text('local-dir:FILE')}, pretrained=True)"
    return files, usage


def _timm(loaded: LoadedBackbone, _: CardFields) -> tuple[bytes, str]:
    if own_normalisation(loaded.backbone)[0] is not loaded.backbone:
        tagged = "" if loaded.recipe is not None else ", or name the architecture without a tag (--arch)"
        raise InputError(
            "These weights expect another normalisation than ImageNet's, which a file for timm cannot state: write a "
            f"folder (--out FOLDER --format timm-folder){tagged}."
        )
    content = backbone_bytes(loaded.backbone, loaded.architecture)
    heads = head_count(loaded.backbone, loaded.architecture)
    usage = "; ".join(line.partition("  #")[0] for line in loading_code(loaded.architecture, "FILE", heads=heads))
    if isinstance(loaded.backbone, ReferencePositions):
        own = loaded.backbone.patch_embed.img_size[0]
        usage += (
            f" (for images of {own} pixels; at other sizes timm interpolates position embeddings another way than this "
            "backbone was trained with, which --format onnx and program keep)"
        )
    return content, usage


def _torchvision(loaded: LoadedBackbone, _: CardFields) -> tuple[bytes, str]:
    file = io.BytesIO()
    torch.save(to_torchvision(_tensors(loaded.backbone), architecture=loaded.architecture), file)
    usage = 'model.load_state_dict(torch.load("FILE"), strict=False), which leaves the classifier as it is'
    return file.getvalue(), usage


def _detectron2(loaded: LoadedBackbone, _: CardFields) -> tuple[bytes, str]:
    tensors = to_detectron2(_tensors(loaded.backbone), architecture=loaded.architecture)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    # The heuristics add the model's own prefix, such as backbone.bottom_up.
    content = {"model": arrays, "__author__": "mvssl", "matching_heuristics": True}
    usage = "python -m tools.coco_detection --weights FILE, in a clone of mvssl, trains Mask R-CNN FPN on COCO with it"
    return pickle.dumps(content), usage


def _onnx(loaded: LoadedBackbone, _: CardFields) -> tuple[bytes, str]:
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


def _program(loaded: LoadedBackbone, _: CardFields) -> tuple[bytes, str]:
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
        endings: accepted endings of the file's name; none for a folder.
        write: the content of the file, or of a folder's files by name, and a sentence on usage with FILE for its path.
            Writers of libraries that were given a path would report a full disk in ways of their own.
    """

    endings: tuple[str, ...]
    write: Callable[[LoadedBackbone, CardFields], tuple[bytes | Mapping[str, bytes], str]]


# A new format is one function and one entry, named as in --format.
EXPORT_FORMATS = {
    "timm": ExportFormat(endings=(".safetensors",), write=_timm),
    "timm-folder": ExportFormat(endings=(), write=_timm_folder),
    "torchvision": ExportFormat(endings=(".pth", ".pt"), write=_torchvision),
    "detectron2": ExportFormat(endings=(".pkl",), write=_detectron2),
    "onnx": ExportFormat(endings=(".onnx",), write=_onnx),
    "program": ExportFormat(endings=(".pt2",), write=_program),
}
