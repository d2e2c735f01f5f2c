"""Writes report.html, one self-contained page about a run, from the structured files of its folder."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.models.backbones import normalisation
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_metrics, read_throughput
from mvssl.runs.results import conditions_of, describe, read_result
from mvssl.runs.summary import read_summary
from mvssl.weights.backbone_file import loading_code
from pipelines.files import open_regular, read_json, write_whole
from pipelines.names import shell_word, visible
from pipelines.progress import duration, rate
from pipelines.runtime import InputError

Row = Mapping[str, Any]
Curve = Sequence[tuple[float, float]]
"""Step and value of each point."""

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 508, 12, 206  # edges of the plot area
_LARGEST_PICTURE = 1 << 25  # bytes
PAGES = {"neighbours": "Nearest neighbours", "scatter": "Map of features", "attention": "Attention or activation maps"}
"""Pages of what was learned, by evaluation of mvssl-eval."""
MAX_POINTS = 400  # of a curve; more are averaged


def write_report(path: Path, folder: RunFolder) -> None:
    """Write the report of a run, finished or not.

    Raises:
        InputError: the folder holds no run, or its files are damaged.
        OSError: the report cannot be written; an earlier one is untouched.
    """
    write_whole(path, render(folder, path.parent))


def render(folder: RunFolder, place: Path | None = None) -> str:
    """The report as HTML; `place` is the folder that it will be in, by default that of the run."""
    recipe, options = folder.recipe(), folder.options()
    rows = list(read_metrics(folder.metrics)) if folder.metrics.exists() else []
    train = [row for row in rows if row["kind"] == "train"]
    knn, probe = ([row for row in rows if row["kind"] == kind] for kind in ("knn", "probe"))
    speed = list(read_throughput(folder.throughput)) if folder.throughput.exists() else []
    view_fields, fields = _recipe_fields(recipe)
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            run=shell_word(str(folder.path)),
            title=options.get("run_name") or folder.path.name,
            recipe=recipe,
            options=options,
            epoch=(train[-1].get("epoch") or 0) + 1 if train else 0,
            tiles=_tiles(train, knn, probe, speed, folder),
            failure=_start_of(folder.failure, 4000).decode(errors="replace").splitlines(),
            charts=_charts(recipe, train, knn, probe, speed),
            summary=read_summary(folder.summary),
            evaluations=_evaluations(folder),
            pages=_pages(folder, place or folder.path),
            more_pages=[
                name for name in PAGES if folder.backbone.exists() and not (folder.path / f"{name}.html").exists()
            ],
            # Markup, lest it is cut as long text is
            views_png=Markup(base64.b64encode(_start_of(folder.views, _LARGEST_PICTURE)).decode()),
            loading_code=_loading_code(recipe, folder) if folder.backbone.exists() else (),
            view_fields=view_fields,
            fields=fields,
            machine=_machine(folder),
        )
    )


@cache
def templates() -> Environment:
    """The templates in this package: report.html.j2 and chart.svg.j2, which it includes; text in them is `visible`."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _visible(value: object) -> object:
    """A value of a template: text as `visible`, unless a template has made it."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _loading_code(recipe: Recipe, folder: RunFolder) -> list[str]:
    return loading_code(recipe.backbone.name, str(folder.backbone), own=normalisation(recipe.backbone))


def _start_of(path: Path, most: int) -> bytes:
    """The first bytes of a file; none if there is no file."""
    if not path.exists():
        return b""
    with open_regular(path) as file:
        return file.read(most)


def _tiles(
    train: Sequence[Row], knn: Sequence[Row], probe: Sequence[Row], speed: Sequence[Row], folder: RunFolder
) -> list[tuple[str, str]]:
    """Name and value of the headline numbers."""
    tiles: list[tuple[str, str]] = []
    if train:
        last = train[-1]
        tiles += [("steps", f"{last['step']:,}"), ("loss", f"{last['loss']:.4f}")]
        if last.get("effective_rank") is not None:
            tiles.append(("effective rank", f"{last['effective_rank']:.1f}"))
    if knn:
        tiles.append(("kNN top-1", f"{100 * knn[-1]['top1']:.2f} %"))
    if probe:
        tiles.append(("linear probe top-1", f"{100 * probe[-1]['top1']:.2f} %"))
    if folder.best.is_symlink():
        tiles += _best_tile(knn, probe, os.readlink(folder.best))
    if speed:
        seconds = max(sum(row["seconds"] for row in speed), 1e-9)
        images = sum(row["images_per_second"] * row["seconds"] for row in speed)
        waited = sum(row["data_wait"] * row["seconds"] for row in speed)
        tiles += [
            ("source images/s", rate(images / seconds)),
            ("data wait", f"{100 * waited / seconds:.1f} %"),
            ("training time", duration(seconds)),
            ("peak memory", f"{max(row['memory_gib'] for row in speed):.2f} GiB"),
        ]
    return tiles


def _best_tile(knn: Sequence[Row], probe: Sequence[Row], linked: str) -> list[tuple[str, str]]:
    """The best checkpoint, in the folder `linked`, with its accuracies; empty if they are not known."""
    kinds = {"kNN": knn, "probe": probe}
    found = [
        (row["step"], f"{kind} {100 * row['top1']:.2f} %")
        for kind, rows in kinds.items()
        for row in rows
        if f"step-{row['step']:08d}" == linked
    ]
    return [("best checkpoint", f"step {found[0][0]:,}, {', '.join(text for _, text in found)}")] if found else []


def _charts(
    recipe: Recipe, train: Sequence[Row], knn: Sequence[Row], probe: Sequence[Row], speed: Sequence[Row]
) -> list[Chart]:
    """The training curves, as far as there are numbers for them."""
    losses = [name for name in (train[0] if train else {}) if name.startswith("loss/")]
    charts = [
        make_chart("Loss per task", {name.removeprefix("loss/"): _curve(train, name) for name in losses}),
        make_chart(
            f"Online top-1, % ({_knn_conditions(recipe)})",
            {"kNN": _curve(knn, "top1", scale=100), "linear probe": _curve(probe, "top1", scale=100)},
        ),
        make_chart("Learning rate", {"lr": _curve(train, "lr")}),
        None if recipe.method == "simsiam" else make_chart("EMA momentum", {"tau": _curve(train, "target_decay")}),
        make_chart("Standard deviation of the embeddings", {"std": _curve(train, "embedding_std")}),
        make_chart("Effective rank of the embeddings", {"rank": _curve(train, "effective_rank")}),
        make_chart("Gradient norm", {"norm": _curve(train, "grad_norm")}, log=True),
        make_chart("Source images/s", {"rate": _curve(speed, "images_per_second")}),
        make_chart(
            "Waiting, % of the time",
            {
                "step waits for data": _curve(speed, "data_wait", scale=100),
                "GPU idle": _curve(speed, "device_idle", scale=100),
            },
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _curve(rows: Iterable[Row], name: str, *, scale: float = 1.0) -> Curve:
    return [(row["step"], scale * row[name]) for row in rows if row.get(name) is not None]


def _knn_conditions(recipe: Recipe) -> str:
    evaluation = recipe.evaluation
    known = {"resize": evaluation.resize, "crop": evaluation.crop, "interpolation": evaluation.interpolation}
    return describe({**known, "network": "online"})


def _evaluations(folder: RunFolder) -> list[tuple[str, str, Row, str]]:
    """Evaluation, network, best result and conditions of the result files of mvssl-eval."""
    found = [read_result(path) for path in sorted(folder.evaluations.glob("*.json"))]
    return [
        (
            held["evaluation"],
            held["network"],
            held["results"].get("best", held["results"]),
            describe(conditions_of(held)),
        )
        for held in found
    ]


def _pages(folder: RunFolder, place: Path) -> list[tuple[str, str]]:
    """Title and address, relative to `place`, of the pages of mvssl-eval that the run has."""
    found = [(title, folder.path / f"{name}.html") for name, title in PAGES.items()]
    for name, title in PAGES.items():
        others = sorted(folder.evaluations.glob(f"{name}-*.html"))
        found += [(f"{title} ({page.stem.removeprefix(f'{name}-')})", page) for page in others]
    return [
        (title, quote(os.fsencode(os.path.relpath(page.absolute(), place.absolute()))))
        for title, page in found
        if page.is_file()
    ]


def _recipe_fields(recipe: Recipe) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """Name and value by view of the view fields, and name and value of all others."""
    plain = to_dict(recipe)
    views = plain.pop("views")
    by_view = [[name, *(_short(view[name]) for view in views)] for name in views[0] if name != "name"]
    flat = [(name, _short(value)) for name, value in plain.items() if not isinstance(value, dict)]
    nested = [(name, inner) for name, inner in plain.items() if isinstance(inner, dict)]
    return by_view, flat + [(f"{name}.{key}", _short(value)) for name, inner in nested for key, value in inner.items()]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _machine(folder: RunFolder) -> dict[str, Any] | None:
    """Contents of environment.json; None if it is missing."""
    try:
        held: dict[str, Any] = read_json(folder.environment)
        whole = isinstance(held["packages"], dict) and all(isinstance(held[name], list) for name in ("gpus", "command"))
        if not whole or not all(isinstance(one, str) for one in (*held["gpus"], *held["command"])):
            raise ValueError("packages, gpus or command are of another kind")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder.environment} is damaged ({error}): restore it, or delete it.") from error
    return {"cores": "?", "processor": "?", "platform": "?", "python": "?", **held}


class Tick(NamedTuple):
    """A mark on an axis: its place in SVG units and its label."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A line chart in SVG units, as the template draws it; `curves` holds the points of each curve by name."""

    title: str
    label: str
    curves: dict[str, list[tuple[float, float]]]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    bottom: int = BOTTOM


def make_chart(title: str, curves: Mapping[str, Curve], *, log: bool = False) -> Chart | None:
    """Lay out curves over steps in one frame; None if there is no point.

    With `log` the y axis is logarithmic, and values of 0 and less are left out.
    """
    shown = {name: points for name, curve in curves.items() if (points := _points(curve, log=log))}
    if not shown:
        return None
    xs, ys = ([point[axis] for points in shown.values() for point in points] for axis in (0, 1))
    y_marks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_marks[0], y_marks[-1]

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def up(y: float) -> float:
        return round(BOTTOM - (y - y_low) / (y_high - y_low) * (BOTTOM - TOP), 1)

    return Chart(
        title=title,
        label=f"{title}, logarithmic" if log else title,
        curves={name: [(across(x), up(y)) for x, y in points] for name, points in shown.items()},
        x_ticks=[Tick(across(x), format_number(x)) for x in ticks(min(xs), max(xs)) if x_low <= x <= x_high],
        y_ticks=[Tick(up(y), format_number(10**y if log else y)) for y in y_marks],
    )


def _points(curve: Curve, *, log: bool) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points, means of neighbours where there are more; decimal logarithms of y if `log`."""
    pairs = [(x, y) for x, y in curve if math.isfinite(y) and (y > 0 or not log)]
    group = -(-len(pairs) // MAX_POINTS) or 1
    points = []
    for start in range(0, len(pairs), group):
        some = pairs[start : start + group]
        x, y = (sum(values) / len(some) for values in zip(*some, strict=True))
        points.append((x, math.log10(y) if log else y))
    return points


def ticks(low: float, high: float) -> list[float]:
    """Two to five equally spaced round numbers or a few more, from at most `low` to at least `high`."""
    if not high > low:
        half = abs(low) / 10 or 1.0
        low, high = low - half, high + half
    return [float(tick) for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)]


def log_ticks(low: float, high: float) -> list[float]:
    """Decimal logarithms of 1, 2 and 5 times powers of ten (from two decades on, of powers of ten) that enclose
    `low` and `high`, which are logarithms too.
    """
    digits = (1, 2, 5) if high - low < 2 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 2)
    marks = [power + math.log10(digit) for power in powers for digit in digits]
    first = max(n for n, mark in enumerate(marks) if mark <= low + 1e-9)
    last = min(n for n, mark in enumerate(marks) if mark >= high - 1e-9)
    return marks[first : max(last, first + 1) + 1]


def format_number(value: float) -> str:
    """A number in few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k"
    if abs(value) < 0.001:
        return f"{value:.0e}"
    return f"{value:.4g}"
