"""The picture of a run's losses, drawn from metrics.jsonl."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mvssl.monitor.places.jsonl import read_jsonl


def plot_losses(metrics: Path, out: Path) -> None:
    """Draw loss per task and, where there is one, kNN accuracy over the steps of `metrics` as a PNG."""
    rows = list(read_jsonl(metrics))
    train = [row for row in rows if row["kind"] == "train"]
    knn = [row for row in rows if row["kind"] == "knn"]
    figure = Figure(figsize=(8.0, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [row["step"] for row in train]
    for key in [key for key in (train[0] if train else {}) if key.startswith("loss/")]:
        axes.plot(steps, [row[key] for row in train], label=key.removeprefix("loss/"), linewidth=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per task")
    axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    if knn:
        right = axes.twinx()
        right.plot([row["step"] for row in knn], [100 * row["top1"] for row in knn], "k.--", label="kNN top-1")
        right.set_ylabel("kNN top-1 (%)")
        right.set_ylim(0, 100)
        more_handles, more_labels = right.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), frameon=False)
    aside = out.with_name(f".{out.name}")
    figure.savefig(aside, format="png")
    os.replace(aside, out)
