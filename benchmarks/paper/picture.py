"""One picture of the paper's comparison: accuracies, and curves during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.paper.cells import KIND_TITLES, METHODS, OPTIMIZERS, TITLES, VARIANTS, kind_of
from benchmarks.paper.results import Results, Row

COLOURS = {
    "two-view": "#888888",
    "shared": "#c8553d",
    "per-view": "#28666e",
    "shared + cutout": "#f2a07b",
    "per-view + cutout": "#7fb069",
}
CURVES_OF = "byol"


def plot(found: Results, out: Path) -> None:
    """Plot the accuracy of all methods, and curves of BYOL's runs with the paper's optimiser, as a PNG.

    Args:
        found: finished cells.
        out: file to write.
    """
    figure = Figure(figsize=(14.5, 6.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, width_ratios=(1.4, 1, 1))
    _accuracy(axes[0, 0], found, "linear", "linear top-1, %")
    _accuracy(axes[1, 0], found, "knn", "kNN top-1, %")
    runs = {variant: rows for variant in ("shared", "per-view") if (rows := found.runs(CURVES_OF, variant, "paper"))}
    title = f"{TITLES[CURVES_OF]}, {KIND_TITLES[kind_of(CURVES_OF, 'paper')]}"
    for task, style in (("global", "-"), ("local", "--")):
        for variant, rows in runs.items():
            x, y = _curve([row["curves"] for row in rows], f"loss/{task}")
            axes[0, 1].plot(x, y, style, color=COLOURS[variant], label=f"{variant}, {task}", linewidth=1.2)
    axes[0, 1].set_title(f"{title}: loss of each task")
    for variant, rows in runs.items():
        x, y = _curve([row["curves"] for row in rows], "grad_norm")
        axes[1, 1].plot(x, y, color=COLOURS[variant], label=variant, linewidth=1.2)
    axes[1, 1].set_title(f"{title}: norm of the gradient")
    axes[1, 1].set_yscale("log")
    styles = {"global": ":", "local": "--", "global/local": "-"}
    for part, variant in (("predictor", "shared"), ("encoder", "shared"), ("encoder", "per-view")):
        for pair, style in styles.items():
            if part == "encoder" and pair != "global/local":
                continue
            _marks(
                axes[0, 2],
                runs.get(variant, []),
                partial(_cosine, part, pair),
                style,
                colour="black" if part == "predictor" else COLOURS[variant],
                label=f"{variant}, {part}: {pair}",
            )
    axes[0, 2].axhline(0, color="#bbbbbb", linewidth=0.8)
    axes[0, 2].set_title(f"{title}: cosine of two views' gradients")
    ranks: dict[str, tuple[str, Callable[[Row], float]]] = {
        "embeddings": ("-", lambda mark: mark["embedding_rank"]),
        "predictions, global": ("--", lambda mark: mark["prediction_rank"]["global"]),
        "predictions, local": (":", lambda mark: mark["prediction_rank"]["local"]),
    }
    for variant, rows in runs.items():
        for what, (style, rank) in ranks.items():
            _marks(axes[1, 2], rows, rank, style, colour=COLOURS[variant], label=f"{variant}: {what}")
    axes[1, 2].set_title(f"{title}: effective rank")
    for place in (axes[0, 1], axes[1, 1], axes[0, 2], axes[1, 2]):
        place.set_xlabel("step")
        place.grid(alpha=0.25)
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize=7, frameon=False)
    if runs:  # between the ranks of embeddings and of predictions
        axes[1, 2].legend(fontsize=7, frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.4))
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


def _curve(curves: Sequence[Mapping[str, Sequence[float | None]]], name: str) -> tuple[list[float], list[float]]:
    """Steps and the mean over the runs that have a number there."""
    steps, values = [], []
    for at, step in enumerate(curves[0]["step"]):
        found = [curve[name][at] for curve in curves if at < len(curve[name])]
        numbers = [value for value in found if value is not None]
        if step is not None and numbers:
            steps.append(step)
            values.append(mean(numbers))
    return steps, values


def _cosine(part: str, pair: str, mark: Row) -> float | None:
    cosine: float | None = mark["cosine"][part].get(pair)
    return cosine


def _marks(
    place: Axes, rows: Sequence[Row], value: Callable[[Any], float | None], style: str, *, colour: str, label: str
) -> None:
    """A line of the means over runs at their marks."""
    by_step: dict[int, list[float]] = {}
    for row in rows:
        for mark in row["signals"]:
            found = value(mark)
            if found is not None:
                by_step.setdefault(mark["step"], []).append(found)
    if by_step:
        steps = sorted(by_step)
        place.plot(steps, [mean(by_step[step]) for step in steps], style, color=colour, label=label, linewidth=1.2)
