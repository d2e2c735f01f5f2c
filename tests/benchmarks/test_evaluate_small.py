"""evaluate_small: the reference implementation's checkpoint format, and the table of accuracies."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import evaluate_small
from benchmarks.report import tables
from mvssl.models.encoder import build_networks
from mvssl.recipes import all_recipes
from mvssl.weights.formats import find_network
from mvssl.weights.read import read_weights


def test_the_releases_layout_holds_all_networks(tmp_path: Path) -> None:
    evaluate_small.release_file(tmp_path / "release.pth")
    found = find_network(read_weights(tmp_path / "release.pth"), where="it")
    online, _ = build_networks(all_recipes()[evaluate_small.RECIPE]())
    assert found.format == "the reference implementation"
    assert all(torch.equal(found.backbone[name], value) for name, value in online.backbone.state_dict().items())
    assert {name.split(".")[0] for name in found.predictor} == {"global", "local", "cutout"}


def test_the_table_of_evaluations() -> None:
    result = {
        "rows": {"random": {"knn": {"top1": 0.25, "interval": [0.2, 0.3]}}, "supervised": {}},
        "settings": {"size": 64, "supervised_epochs": 1, "release_epochs": 2, "finetune_epochs": 3},
        "recipe": "r",
        "environment": {"packages": {}, "cores": 2, "processor": "p", "gpus": [], "command": "c", "torch_threads": 2},
    }
    lines = tables.evaluation({"evaluation_cpu": result})
    assert lines[2] == "| random | 25.0 % (20.0 to 30.0) | | | |"
    assert "the release's probe for 2 epochs instead of 100" in lines[-1]
