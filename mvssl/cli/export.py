"""mvssl-export: write a run's backbone as a safetensors file that timm loads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mvssl.backbones import build_backbone
from mvssl.checkpoint import load
from mvssl.run_folder import RunFolder
from mvssl.weights.backbone_file import export_backbone
from pipelines.console import run_cli
from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write a run's backbone as a safetensors file that timm loads.

    Attributes:
        run: the run folder.
        out: the file to write, e.g. backbone.safetensors.
        network: online is the trained network; target is its moving average.
    """

    run: Path
    out: Path
    network: Literal["online", "target"] = "online"


def body(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parsed = tyro.cli(ExportArguments, prog="mvssl-export", args=list(arguments))
    folder = RunFolder(parsed.run)
    recipe = folder.recipe()
    saved = load(folder.last)
    prefix = "backbone."
    weights = saved.state["step"][parsed.network]
    if weights is None:
        raise InputError(
            f"network is 'target' but the run in {parsed.run} has none of its own ({recipe.method} takes the online "
            "network's embeddings as targets): leave --network out."
        )
    backbone = build_backbone(recipe.backbone)
    backbone.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    export_backbone(backbone, recipe.backbone.name, parsed.out)
    print(
        f"{parsed.out}: {recipe.backbone.name} ({parsed.network} network), step {saved.meta['step']}; load it with\n"
        f'  timm.create_model("{recipe.backbone.name}", num_classes=0, checkpoint_path="{parsed.out}")'
    )
    return 0


def main() -> None:
    """Console script."""
    sys.exit(run_cli(lambda: body(sys.argv[1:])))


if __name__ == "__main__":
    main()
