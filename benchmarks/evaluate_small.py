"""Results of every evaluation for a random, a supervised and a pre-trained ResNet-18 on 64-pixel images.

python -m benchmarks.evaluate_small TINY_IMAGENET --out FOLDER [--run RUN] [--result FILE]

Pre-trains with a recipe (or takes a given run), trains a network with labels, and measures both and a random one by
mvssl-eval: kNN, the fast linear probe, the reference implementation's, and fine-tuning with 10 % of the labels. A
random network in a checkpoint of the reference implementation's format is measured as well. A second call resumes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.harness.command import check_positive, command_of
from benchmarks.harness.results import measured_by, write_result
from mvssl.models.encoder import build_networks
from mvssl.recipes import all_recipes
from mvssl.runs.folder import RunFolder
from mvssl.runs.results import read_result
from pipelines.runtime import InputError, parse_arguments, run_cli

PROG = "python -m benchmarks.evaluate_small"
RECIPE = "byol_resnet18_tiny_imagenet"
EVALUATIONS = {
    "knn": "knn-{}",
    "linear": "linear-fast-{}",
    "release": "linear-release-{}",
    "finetune": "finetune-10pct-{}",
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure three ResNets.

    Attributes:
        data: images of 64 pixels in train/ and val/, one folder a class.
        out: folder for networks and results.
        run: a run of the recipe; by default OUT/run, which is trained first.
        size: side of the networks' input.
        supervised_epochs: epochs of the network trained with labels.
        release_epochs: epochs of the reference implementation's linear probe, which has 100 by default.
        finetune_epochs: epochs of the fine-tuning.
        result: JSON file to write.
    """

    data: tyro.conf.Positional[Path]
    out: Path
    run: Path | None = None
    size: int = 64
    supervised_epochs: int = 5
    release_epochs: int = 5
    finetune_epochs: int = 20
    result: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "size", "supervised_epochs", "release_epochs", "finetune_epochs")


def release_file(path: Path) -> None:
    """Write random networks as a checkpoint of the reference implementation.

    It holds online_model and target_model with backbone.*, projector.* and predictors.TASK.*, and the rest of the
    training state (PAPER.md sections 3 and 6).
    """
    online, _ = build_networks(all_recipes()[RECIPE]())
    tensors = {name: tensor for name, tensor in online.state_dict().items() if not name.startswith("predictors.")}
    for task, mlp in online.predictors.to_mlps().items():
        tensors |= {f"predictors.{task}.{name}": tensor for name, tensor in mlp.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"online_model": wrapped, "target_model": wrapped, "optimizer": {}, "scaler": {}, "epoch": 0}, path)


def _call(module: str, *arguments: object) -> None:
    """Run one of our commands."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    print(f"$ {module} {' '.join(map(str, arguments))}", file=sys.stderr, flush=True)
    if subprocess.run(command, check=False).returncode:
        raise InputError(f"{module} failed, see above: fix the cause and run the same command again.")


def measure(asked: Arguments) -> dict[str, Any]:
    """Run what is missing; the result as plain JSON values, also written after every evaluation."""
    run = asked.run or asked.out / "run"
    if not RunFolder(run).backbone.exists():
        more = ["--resume"] if RunFolder(run).has_checkpoint() else []
        _call("mvssl.cli.train", RECIPE, "--data", asked.data, "--out", run, "--cache", "auto", *more)
    here = ["--data", asked.data, "--resize", asked.size, "--crop", asked.size]
    supervised, foreign = asked.out / "supervised.safetensors", asked.out / "release.pth"
    trained = ["--epochs", asked.supervised_epochs, "--lr", 0.1, "--cache", "auto", "--backbone-out", supervised]
    if not supervised.exists():
        random = ["--untrained", "--arch", "resnet18", *here, "--out", asked.out / "supervised"]
        _call("mvssl.cli.eval", "finetune", *random, *trained)
    if not foreign.exists():
        release_file(foreign)
    networks: dict[str, tuple[list[object], str]] = {
        "random": (["--untrained", "--arch", "resnet18"], "untrained"),
        "supervised": (["--weights", supervised], "supervised"),
        "pre-trained": (["--run", run], "online"),
        "release's layout, random": (["--weights", foreign], "release"),
    }
    options: dict[str, list[object]] = {
        "knn": ["knn", "--k", 20],
        "linear": ["linear"],
        "release": ["linear", "--protocol", "release", "--release.epochs", asked.release_epochs],
        "finetune": ["finetune", "--labels", 0.1, "--epochs", asked.finetune_epochs, "--batch-size", 128],
    }
    options["release"] += ["--release.cache", "auto"]
    options["finetune"] += ["--cache", "auto"]
    rows: dict[str, dict[str, Any]] = {}
    for network, (subject, name) in networks.items():
        out = asked.out / name
        rows[network] = {}
        for evaluation in EVALUATIONS if "layout" not in network else ("knn",):
            began = time.monotonic()
            _call("mvssl.cli.eval", *options[evaluation], *subject, *here, "--out", out)
            held = read_result(out / f"{EVALUATIONS[evaluation].format(name)}.json")["results"]
            best = held.get("best", held)
            rows[network][evaluation] = {
                "top1": best["top1"],
                "interval": best["top1_interval_95"],
                "seconds": time.monotonic() - began,
            }
            write_result(asked.result, _whole(asked, rows, partial=True))
    return _whole(asked, rows, partial=False)


def _whole(asked: Arguments, rows: dict[str, dict[str, Any]], *, partial: bool) -> dict[str, Any]:
    return {
        "benchmark": "evaluate_small",
        "partial": partial,
        "recipe": RECIPE,
        "settings": {
            "size": asked.size,
            "supervised_epochs": asked.supervised_epochs,
            "release_epochs": asked.release_epochs,
            "finetune_epochs": asked.finetune_epochs,
        },
        "rows": rows,
        **measured_by(command_of(PROG, sys.argv[1:])),
    }


def body() -> None:
    """Run the command."""
    asked = parse_arguments(Arguments, prog=PROG, args=sys.argv[1:])
    write_result(asked.result, measure(asked))


if __name__ == "__main__":
    run_cli(body)
