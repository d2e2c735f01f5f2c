"""One picture of the paper's comparison: accuracies, and curves during training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.paper.cells import KIND_TITLES, METHODS, OPTIMIZERS, TITLES, VARIANTS, kind_of
from benchmarks.paper.results import Results, Row, cosine

COLOURS = {
    "two-view": "#888888",
    "shared": "#c8553d",
    "per-view": "#28666e",
    "shared + cutout": "#f2a07b",
    "per-view + cutout": "#7fb069",
}
CURVES_OF = "byol"
STYLES = {"global": ":", "local": "--", "global/local": "-"}


def plot(found: Results, out: Path) -> None:
    """Plot the accuracy of all methods, and curves of BYOL's runs with the paper's optimiser, as a PNG."""
    figure = Figure(figsize=(14.5, 6.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, width_ratios=(1.4, 1, 1))
    _accuracy(axes[0, 0], found, "linear", "linear top-1, %")
    _accuracy(axes[1, 0], found, "knn", "kNN top-1, %")
    loss, norm, angle, rank = axes[0, 1], axes[1, 1], axes[0, 2], axes[1, 2]
    runs = {variant: rows for variant in ("shared", "per-view") if (rows := found.runs(CURVES_OF, variant, "paper"))}
    for task, style in (("global", "-"), ("local", "--")):
        for variant, rows in runs.items():
            _line(loss, _curve(rows, f"loss/{task}"), style, COLOURS[variant], f"{variant}, {task}")
    for variant, rows in runs.items():
        _line(norm, _curve(rows, "grad_norm"), "-", COLOURS[variant], variant)
    for pair, style in STYLES.items():
        points = _marks(runs.get("shared", []), partial(cosine, "predictor", pair))
        _line(angle, points, style, "black", f"shared, predictor: {pair}")
    for variant, rows in runs.items():
        points = _marks(rows, partial(cosine, "encoder", "global/local"))
        _line(angle, points, "-", COLOURS[variant], f"{variant}, encoder: global/local")
    angle.axhline(0, color="#bbbbbb", linewidth=0.8)
    for variant, rows in runs.items():
        for what, style, value in (
            ("embeddings", "-", lambda mark: mark["embedding_rank"]),
            ("predictions, global", "--", lambda mark: mark["prediction_rank"]["global"]),
            ("predictions, local", ":", lambda mark: mark["prediction_rank"]["local"]),
        ):
            _line(rank, _marks(rows, value), style, COLOURS[variant], f"{variant}: {what}")
    about = f"{TITLES[CURVES_OF]}, {KIND_TITLES[kind_of(CURVES_OF, 'paper')]}"
    for place, title in (
        (loss, "loss of each task"),
        (norm, "norm of the gradient"),
        (angle, "cosine of two views' gradients"),
        (rank, "effective rank"),
    ):
        place.set_title(f"{about}: {title}")
        place.set_xlabel("step")
        place.grid(alpha=0.25)
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize=7, frameon=False)
    norm.set_yscale("log")
    if runs:  # between the ranks of embeddings and of predictions
        rank.legend(fontsize=7, frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.4))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Software": None})  # else the bytes change with the version of matplotlib


def _accuracy(place: Axes, found: Results, measure: str, title: str) -> None:
    """Bars of the means, dots of the seeds; a group for each method and optimiser that has a run."""
    groups = [
        (method, optimizer)
        for optimizer, method in product(OPTIMIZERS, METHODS)
        if any(found.runs(method, variant, optimizer) for variant in VARIANTS)
    ]
    width = 0.8 / len(VARIANTS)
    lowest = 100.0
    for n, variant in enumerate(VARIANTS):
        for m, (method, optimizer) in enumerate(groups):
            values = [100 * row[measure] for row in found.runs(method, variant, optimizer)]
            if values:
                x = m + (n - (len(VARIANTS) - 1) / 2) * width
                label = variant if variant not in place.get_legend_handles_labels()[1] else None
                place.bar(x, mean(values), width * 0.9, color=COLOURS[variant], label=label)
                place.plot([x] * len(values), values, "k.", markersize=3)
                lowest = min(lowest, *values)
    place.set_ylim(bottom=max(0.0, 5 * (lowest // 5) - 5))
    names = [f"{TITLES[method]}\n{KIND_TITLES[kind_of(method, optimizer)]}" for method, optimizer in groups]
    place.set_xticks(range(len(groups)), names)
    place.set_title(f"{title}; a dot a seed, the axis is cut")
    place.grid(axis="y", alpha=0.25)
    if place.get_legend_handles_labels()[0]:
        place.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")


def _line(place: Axes, points: dict[float, list[float]], style: str, colour: str, label: str) -> None:
    """A line of the means over runs, by step."""
    if points:
        means = [mean(values) for values in points.values()]
        place.plot(list(points), means, style, color=colour, label=label, linewidth=1.2)


def _curve(rows: Sequence[Row], name: str) -> dict[float, list[float]]:
    """The runs' values of a metric by step, as far as they have one."""
    points = {}
    for at, step in enumerate(rows[0]["curves"]["step"]):
        values = [row["curves"][name][at] for row in rows if at < len(row["curves"][name])]
        if step is not None and (numbers := [value for value in values if value is not None]):
            points[step] = numbers
    return points


def _marks(rows: Sequence[Row], value: Callable[[Any], float | None]) -> dict[float, list[float]]:
    """The runs' values at their checkpoints by step."""
    points: dict[float, list[float]] = {}
    for mark in (mark for row in rows for mark in row["signals"]):
        if (found := value(mark)) is not None:
            points.setdefault(mark["step"], []).append(found)
    return dict(sorted(points.items()))
