"""A view type of one's own, written in a TOML file, gets its predictor and its loss: no code is edited for it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mvssl.cli import train as train_cli
from mvssl.models.encoder import OnlineNetwork
from mvssl.monitor.loggers import read_jsonl
from mvssl.recipes.files import load_recipe

OWN = """
base = "demo"
epochs = 1
batch_size = 8
task_weights = {quarter = 0.5}
backbone = {name = "test_resnet"}
projector = {hidden = [32], out = 16}
predictor = {hidden = [32], out = 16}
evaluation = {every_epochs = 0}

[[add_views]]
name = "quarter"
task = "quarter"
size = 24
area = [0.05, 0.25]
blur = 0.0
"""


def test_a_view_type_from_a_file_has_a_predictor_and_a_loss(images: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "quarter.toml", tmp_path / "run"
    path.write_text(OWN)
    options = ["--data", str(images), "--out", str(out), "--device", "cpu", "--log-every", "1"]
    assert train_cli.body([str(path), *options]) == 0

    bank = OnlineNetwork(load_recipe(path)).predictors
    assert set(bank.to_mlps()) == {"global", "local", "cutout", "quarter"}

    train = [row for row in read_jsonl(out / "metrics.jsonl") if row["kind"] == "train"]
    assert len(train) == 4
    for row in train:
        parts = {task: row[f"loss/{task}"] for task in ("global", "local", "cutout", "quarter")}
        assert all(0 < value < 4 and math.isfinite(value) for value in parts.values())
        whole = parts["global"] + parts["local"] + parts["cutout"] + 0.5 * parts["quarter"]
        assert math.isclose(row["loss"], whole, rel_tol=1e-5)
    config = json.loads((out / "config.json").read_text())["recipe"]
    assert [view["name"] for view in config["views"]][-1] == "quarter"
