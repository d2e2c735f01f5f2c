"""Compares runs: evaluation results and training curves side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mvssl.monitor.pictures import plain_labels, show_plainly
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_metrics
from mvssl.runs.results import conditions_of, describe, read_result
from pipelines.files import whole_file
from pipelines.names import NAME, visible
from pipelines.runtime import InputError

CURVES = {
    "loss": "loss (all tasks)",
    "effective_rank": "effective rank of the embeddings",
    "embedding_std": "standard deviation of the embeddings",
}
"""Metrics that are plotted in addition to accuracies, with their titles."""
EVALUATIONS = {"knn": "kNN top-1, %", "probe": "online linear probe top-1, %"}


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Results and curves of one network.

    Attributes:
        name: of its folder, followed by the network if the folder holds results of several.
        about: recipe and backbone, or the backbone alone.
        steps: training steps done; 0 without a run.
        curves: steps and values of each curve, by name.
        results: top-1 and its 95 % interval by evaluation, such as linear-fast.
        conditions: a line for each evaluation with its crop, network and start.
    """

    name: str
    about: str
    steps: int
    curves: dict[str, tuple[list[int], list[float]]]
    results: dict[str, tuple[float, float, float]]
    conditions: tuple[str, ...] = ()


def summarise(path: Path) -> list[RunSummary]:
    """Summarise each network of a run folder, or of mvssl-eval's result folder, the trained one first."""
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give run folders, or folders of results (--out of mvssl-eval).")
    folder = RunFolder(path)
    is_run = folder.config.exists()
    stored = [read_result(file) for file in sorted((folder.evaluations if is_run else path).glob("*.json"))]
    if not is_run and not stored:
        raise InputError(f"{path} holds neither a run nor results: give the --out of mvssl-train or mvssl-eval.")
    curves = _curves(folder.metrics) if folder.metrics.exists() else {}
    recipe = folder.recipe() if is_run else None
    networks = list(dict.fromkeys([*(["online"] if is_run else []), *(result["network"] for result in stored)]))
    summaries = []
    for network in networks:
        mine = [result for result in stored if result["network"] == network]
        trained = is_run and network == "online"
        summaries.append(
            RunSummary(
                name=path.name if len(networks) == 1 else f"{path.name}, {network}",
                about=f"{recipe.name}, {recipe.backbone.name}" if recipe else str(mine[0]["identity"]["backbone"]),
                steps=max((steps[-1] for steps, _ in curves.values() if steps), default=0) if trained else 0,
                curves=curves if trained else {},
                results={result["evaluation"]: _headline(result["results"]) for result in mine},
                conditions=tuple(f"{result['evaluation']}: {describe(conditions_of(result))}" for result in mine),
            )
        )
    return summaries


def plot(summaries: Sequence[RunSummary], path: Path) -> None:
    """Plot the curves of the runs, one colour per run, and their results as points with intervals.

    Raises:
        OSError: the file cannot be written.
    """
    shown = [name for name in (*EVALUATIONS, *CURVES) if any(name in summary.curves for summary in summaries)]
    measured = list(dict.fromkeys(name for summary in summaries for name in summary.results))
    runs = [summary.name for summary in summaries]
    panels = len(shown) + bool(measured)
    if not panels:
        raise InputError("These runs have neither curves nor results yet: train or evaluate them first.")
    figure = Figure(figsize=(6 * min(2, panels), 3.6 * -(-panels // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(shown, start=1):
        axes = figure.add_subplot(-(-panels // 2), min(2, panels), number)
        axes.set_title((EVALUATIONS | CURVES)[name], fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        lines = []
        for place, summary in enumerate(summaries):
            steps, values = summary.curves.get(name, ([], []))
            lines += axes.plot(steps, values, color=f"C{place}", marker="." if len(steps) < 30 else "")
        show_plainly(axes.legend(lines, plain_labels(runs), fontsize=8).get_texts(), runs)
    if measured:
        axes = figure.add_subplot(-(-panels // 2), min(2, panels), panels)
        axes.set_title("top-1, % (95 % interval)", fontsize=10)
        axes.set_yticks(range(len(measured)), [visible(name, NAME) for name in measured], parse_math=False)
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
        for place, summary in enumerate(summaries):
            for row, name in enumerate(measured):
                if name in summary.results:
                    top1, low, high = (100 * value for value in summary.results[name])
                    y = row + 0.6 * ((place + 0.5) / len(summaries) - 0.5)
                    axes.errorbar(top1, y, xerr=[[top1 - low], [high - top1]], color=f"C{place}", marker="o", capsize=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _curves(metrics: Path) -> dict[str, tuple[list[int], list[float]]]:
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_metrics(metrics):
        if row["kind"] in EVALUATIONS:
            points = {row["kind"]: 100 * row["top1"]}
        elif row["kind"] != "train":
            continue
        else:
            points = {name: row[name] for name in CURVES if row.get(name) is not None}
        for name, value in points.items():
            steps, values = curves.setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(value)
    return curves


def _headline(results: Mapping[str, Any]) -> tuple[float, float, float]:
    of = results.get("best", results)
    return of["top1"], *of["top1_interval_95"]
