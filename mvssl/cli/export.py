"""mvssl-export: write a backbone as a file that other programs load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mvssl.config.evaluation import BackboneSource
from pipelines.names import visible
from pipelines.runtime import parse_arguments, run_cli


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Export the backbone of a run or a file for other programs.

    Attributes:
        source: which backbone. --crop is the image size of onnx and program.
        out: the file to write: .safetensors (timm), .pth (torchvision), .pkl (detectron2), .onnx, .pt2 (program).
        format: timm's names; torchvision's; Detectron2's for Mask R-CNN; an ONNX program, checked with onnxruntime
            where it is installed; or a program of torch.export.
        overwrite: replace an existing file.
    """

    source: Annotated[BackboneSource, tyro.conf.arg(name="")]
    out: Path
    format: Literal["timm", "torchvision", "detectron2", "onnx", "program"] = "timm"
    overwrite: bool = False


def body(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    asked = parse_arguments(ExportArguments, prog="mvssl-export", args=arguments)
    from mvssl.weights.export import export  # with torch, which takes seconds and help does not need
    from mvssl.weights.load import load_backbone

    loaded = load_backbone(asked.source)
    note = export(loaded, asked.format, asked.out, overwrite=asked.overwrite)
    what = f"{loaded.architecture} ({loaded.about or loaded.name})"
    print(visible(f"{asked.out}: {what}, {asked.format}"), visible(f"  {note}"), sep="\n")
    return 0


def main() -> None:
    """Console script."""
    sys.exit(run_cli(lambda: body(sys.argv[1:])))


if __name__ == "__main__":
    main()
