"""mvssl-eval: measure what a backbone has learned."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from mvssl.backbones import build_backbone
from mvssl.evaluate.online import evaluate_knn
from mvssl.monitor.indexing import indexing_progress
from mvssl.options import resolve_device
from mvssl.precision import autocast_dtype
from mvssl.recipe import Recipe
from mvssl.run_folder import RunFolder, write_json
from mvssl.siamese import initial_backbone
from mvssl.weights.backbone_file import load_backbone
from pipelines.console import run_cli
from pipelines.decode import DecoderName
from pipelines.errors import InputError
from pipelines.storage import open_source, split_paths


@dataclass(frozen=True, kw_only=True)
class KnnArguments:
    """kNN accuracy of a run's backbone (SPEC section 6: cosine similarity, votes weighted exp(similarity / 0.07)).

    Attributes:
        run: the run folder; its recipe says how images are resized and which k are used.
        data: labelled images; by default those the run was given (its --val too). PATH/val is classified by PATH/train
            where both exist, else each image is by all the others.
        backbone: an exported backbone instead of the run's own.
        untrained: measure the run's initial weights instead, for comparison.
        device: auto takes CUDA where there is one.
        decoder: auto takes DALI where it is installed.
        threads: threads that decode.
    """

    run: Path
    data: Path | None = None
    backbone: Path | None = None
    untrained: bool = False
    device: str = "auto"
    decoder: DecoderName = "auto"
    threads: int | None = None


def knn(arguments: KnnArguments) -> None:
    """Measure, print a table and add the result to the run folder's eval-knn.json."""
    folder = RunFolder(arguments.run)
    recipe = folder.recipe()
    device = resolve_device(arguments.device)
    which, backbone = _backbone(arguments, recipe, folder)
    path = arguments.data or folder.option("data")
    if path is None:
        raise InputError(f"{folder.config} names no data set: give one with --data PATH.")
    train_path, val_path = split_paths(path)
    if arguments.data is None:
        val_path = folder.option("val") or val_path
    console = Console()
    train = open_source(train_path, progress=indexing_progress(console, train_path))
    val = None if val_path is None else open_source(val_path, progress=indexing_progress(console, val_path))
    accuracy = evaluate_knn(
        backbone.to(device),
        train,
        val,
        recipe.evaluation,
        device=device,
        autocast=autocast_dtype(recipe.precision, device),
        decoder=arguments.decoder,
        threads=arguments.threads,
    )
    table = Table(title=f"kNN top-1, {recipe.backbone.name}, {which}", title_justify="left", box=None, pad_edge=False)
    for column in ("k", "top-1 %", "neighbours", "classified"):
        table.add_column(column, justify="right")
    bank = min(len(train), recipe.evaluation.max_train or len(train))
    for k, value in accuracy.items():
        queries = f"{len(val):,}" if val is not None else f"{bank:,} (leave one out)"
        table.add_row(str(k), f"{100 * value:.2f}", f"{bank:,}", queries)
    console.print(table)
    results = json.loads(folder.knn.read_text()) if folder.knn.exists() else {}
    results[which] = {"data": str(path), "top1": {str(k): value for k, value in accuracy.items()}}
    write_json(folder.knn, results)


def _backbone(arguments: KnnArguments, recipe: Recipe, folder: RunFolder) -> tuple[str, nn.Module]:
    """What to call the backbone that is asked for, and the backbone itself, in eval mode on the CPU."""
    if arguments.untrained and arguments.backbone is not None:
        raise InputError("untrained and backbone exclude each other: give one of --untrained and --backbone.")
    if arguments.untrained:
        return "untrained", initial_backbone(recipe)
    path = arguments.backbone or folder.backbone
    backbone = build_backbone(recipe.backbone, drop_path=False)
    load_backbone(backbone, path, architecture=recipe.backbone.name)
    return ("trained" if arguments.backbone is None else str(path)), backbone


USAGE = """usage: mvssl-eval knn --run RUN [--data PATH] [--untrained]

  mvssl-eval knn --help          every option"""


def body(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] != "knn":
        raise InputError(f"evaluation is {arguments[0]!r} but must be knn: run mvssl-eval knn --run RUN.")
    knn(tyro.cli(KnnArguments, prog="mvssl-eval knn", args=list(arguments[1:])))
    return 0


def main() -> None:
    """Console script."""
    sys.exit(run_cli(lambda: body(sys.argv[1:])))


if __name__ == "__main__":
    main()
