"""The benchmarks of evaluations measure what they say, on a few images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_linear, evaluate_small
from benchmarks.report.accuracy_tables import evaluation, linear
from mvssl.models.encoder import build_networks
from mvssl.weights.formats import find_network
from mvssl.weights.load import read_weights
from pipelines.runtime import InputError


def write_features(path: Path, *, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, 300)
    centres = np.random.default_rng(0).normal(size=(6, 8))
    np.save(path, (centres[labels] + rng.normal(size=(300, 8))).astype(np.float32))
    rows = [f"{n},image{n},{label},class{label}" for n, label in enumerate(labels)]
    path.with_suffix(".csv").write_text("\n".join(["row,key,label,class", *rows]) + "\n")
    return path


def test_bench_linear_compares_equally_accurate_classifiers(tmp_path: Path) -> None:
    train, val = write_features(tmp_path / "train.npy", seed=1), write_features(tmp_path / "val.npy", seed=2)
    asked = bench_linear.Arguments(train=train, val=val, epochs=20, repeats=1, whole=True)
    contenders = bench_linear.measure(asked)["contenders"]
    assert list(contenders) == ["one setting", "the grid, raced", "scikit-learn, best C", "the grid, all epochs"]
    top1 = {name: own["top1"] for name, own in contenders.items()}
    assert min(top1.values()) > 0.6
    assert max(top1.values()) - min(top1.values()) < 0.06
    assert contenders["one setting"]["times_one_setting"] == 1
    held = bench_linear.measure(asked)
    lines = linear({"linear_cpu": held})
    assert [line.split("|")[1].strip() for line in lines[2:6]] == list(contenders)
    (tmp_path / "val.csv").unlink()
    with pytest.raises(InputError, match="write them with mvssl-features"):
        bench_linear.load(val)


def test_the_releases_layout_holds_all_networks(tmp_path: Path) -> None:
    evaluate_small.release_file(tmp_path / "release.pth")
    found = find_network(read_weights(tmp_path / "release.pth"), where="it")
    online, _ = build_networks(evaluate_small.all_recipes()[evaluate_small.RECIPE]())
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
    lines = evaluation({"evaluation_cpu": result})
    assert lines[2] == "| random | 25.0 % (20.0 to 30.0) | | | |"
    assert "the release's probe for 2 epochs instead of 100" in lines[-1]
