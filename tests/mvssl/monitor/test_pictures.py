"""losses.png."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mvssl.monitor.pictures import plot_losses
from mvssl.runs.jsonl import JsonLines


def test_losses_of_no_and_of_some_steps(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    plot_losses(lines.path, tmp_path / "empty.png")
    for step in range(1, 20):
        lines.write({"kind": "train", "step": step, "loss": 1.0, "loss/global": 2.0 / step, "loss/local": 3.0 / step})
    lines.write({"kind": "knn", "step": 19, "top1": 0.5})
    lines.sync()
    plot_losses(lines.path, tmp_path / "losses.png")
    with Image.open(tmp_path / "empty.png") as empty, Image.open(tmp_path / "losses.png") as full:
        assert full.size == empty.size
        assert full.tobytes() != empty.tobytes()
    lines.close()
    assert not list(tmp_path.glob(".*"))
