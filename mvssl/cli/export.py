"""mvssl-export: write a backbone as a file or folder that other programs load, or upload it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mvssl.config.evaluation import BackboneSource
from pipelines.names import visible
from pipelines.runtime import InputError, parse_arguments, run_cli


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Export the backbone of a run or a file for other programs.

    Attributes:
        source: which backbone. --crop is the image size of onnx and program.
        out: the file to write: .safetensors (timm), .pth (torchvision), .pkl (detectron2), .onnx, .pt2 (program); or
            the folder (timm-folder).
        format: timm's names; a folder for timm and its hub loader, with normalisation, input size and a model card;
            torchvision's; Detectron2's for Mask R-CNN; an ONNX program, checked with onnxruntime where it is installed;
            or a program of torch.export. With --push it is timm-folder.
        push: upload that folder to this model of a hub account, USER/NAME; --out may then be left out.
        private: a model that --push creates is private.
        license: of the weights, for the model card: an identifier such as mit or cc-by-nc-4.0.
        overwrite: replace an existing file.
    """

    source: Annotated[BackboneSource, tyro.conf.arg(name="")]
    out: Path | None = None
    format: Literal["timm", "timm-folder", "torchvision", "detectron2", "onnx", "program"] | None = None
    push: str | None = None
    private: bool = False
    license: str | None = None
    overwrite: bool = False


def body(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    asked = parse_arguments(ExportArguments, prog="mvssl-export", args=arguments)
    _check(asked)
    from mvssl.weights.export import export  # with torch, which takes seconds and help does not need
    from mvssl.weights.load import load_backbone
    from mvssl.weights.timm_folder import CardFields, check_push, folder_files, push

    if asked.push is not None:
        check_push(asked.push)
    card = CardFields(licence=asked.license)
    loaded = load_backbone(asked.source)
    kind = asked.format or ("timm" if asked.push is None else "timm-folder")
    what = f"{loaded.architecture} ({loaded.about or loaded.name})"
    if asked.out is not None:
        note = export(loaded, kind, asked.out, overwrite=asked.overwrite, card=card)
        print(visible(f"{asked.out}: {what}, {kind}"), visible(f"  {note}"), sep="\n")
    if asked.push is not None:
        address = push(folder_files(loaded, card), asked.push, private=asked.private)
        print(visible(f"{address}: {what}"))
    if kind == "timm-folder" and asked.license is None:
        print("  The model card states no licence: name one with --license.")
    return 0


def _check(asked: ExportArguments) -> None:
    if asked.out is None and asked.push is None:
        raise InputError("out is missing: name the file to write with --out PATH.")
    if asked.push is not None and asked.format not in (None, "timm-folder"):
        raise InputError(f"format is {asked.format!r} but --push uploads a timm-folder: leave --format or --push out.")
    if asked.push is None and asked.private:
        raise InputError("private is for a model that --push creates: add --push USER/NAME, or leave it out.")
    if asked.license is not None and asked.push is None and asked.format != "timm-folder":
        raise InputError("license is for a model card: add --format timm-folder or --push, or leave it out.")


def main() -> None:
    """Console script."""
    sys.exit(run_cli(lambda: body(sys.argv[1:])))


if __name__ == "__main__":
    main()
