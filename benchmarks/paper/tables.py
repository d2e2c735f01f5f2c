"""The results of the paper's comparison as Markdown tables, a function each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.paper.cells import (
    ARMS,
    KIND_TITLES,
    METHODS,
    OPTIMIZERS,
    TITLES,
    VARIANTS,
    Cell,
    Point,
    Setting,
    grid,
    kind_of,
)
from benchmarks.paper.power import Components, components, interval
from benchmarks.paper.results import Results, Row
from benchmarks.paper.run_cell import unpack
from benchmarks.report.markdown import table
from benchmarks.report.origins import MADE_BY, NOT_YET, file_of, machine

NAMES = {"CPU": "paper_small_cpu", "CPU, release's init": "paper_small_cpu_release", "GPU": "paper_small_gpu"}
"""Names of the results by where they were measured."""
INITS = {"timm": "timm", "release": "the paper's release"}
MEASURES = {"linear": "linear", "knn": "kNN"}
COMPARED = (
    ("per-view", "shared"),
    ("per-view + cutout", "shared + cutout"),
    ("shared", "two-view"),
    ("per-view", "two-view"),
    ("per-view + cutout", "two-view"),
)
TEST_IMAGES = (1000, 2500, 10_000, 50_000)
DIFFERENCE = 0.02


def results_of(result: Mapping[str, Any]) -> Results:
    """The cells of a result as `benchmarks.report.origins.load` reads it."""
    cells: list[Row] = list(result["cells"])
    return Results(Setting(**cells[0]["setting"]), cells)


def accuracies(results: Mapping[str, Any]) -> list[str]:
    """Top-1 of every method and variant, mean and standard deviation over seeds."""
    rows = []
    for side, found, method, optimizer in _methods(results):
        for measure, title in MEASURES.items():
            cells = [_spread([row[measure] for row in found.runs(method, variant, optimizer)]) for variant in VARIANTS]
            if any(cells):
                rows.append([side, _title(method, optimizer), title, *cells])
    return [*_table(results, ["top-1", *VARIANTS], rows), "", *_origins(results)]


def differences(results: Mapping[str, Any]) -> list[str]:
    """Differences of arms in points, with 95 % intervals over seeds; at last over all runs of a side together."""
    rows = []
    pooled: dict[tuple[str, str], list[list[tuple[Row, Row]]]] = {}
    for side, found, method, optimizer in _methods(results):
        for one, other in COMPARED:
            pairs, what = _pairs(found, method, optimizer, one, other), f"{one} less {other}"
            if pairs:
                rows.append([side, _title(method, optimizer), what, *(_difference(pairs, name) for name in MEASURES)])
                pooled.setdefault((side, what), []).append(pairs)
    for (side, what), parts in pooled.items():
        if len(parts) > 1:
            pairs = [pair for part in parts for pair in part]
            rows.append([side, f"all {len(pairs)} pairs", what, *(_difference(pairs, name) for name in MEASURES)])
    return _table(results, ["difference", *MEASURES.values()], rows)


def tuning(results: Mapping[str, Any]) -> list[str]:
    """The point that tuning chose for each arm, and the range over all points."""
    rows = []
    for side, found, method, optimizer in _methods(results):
        for arm in ARMS:
            cell = Cell(method=method, variant=arm, optimizer=optimizer, seed=1)
            point, tried = found.point(cell), found.tuning(cell)
            spread = f"{100 * min(tried.values()):.1f} to {100 * max(tried.values()):.1f}" if tried else ""
            taken = next((run for run in found.runs(method, arm, optimizer) if "point_from" in run), None)
            if point is None and taken is not None:
                point, spread = Point(**taken["point"]), f"as in {taken['point_from']['results']}"
            if point is None:
                continue
            decay = "" if method == "simsiam" else f"{point.target_decay:g}"
            numbers = [f"{point.base_lr:.3g}", f"{point.weight_decay:g}", decay, spread]
            rows.append([side, _title(method, optimizer), arm, *numbers])
    heads = ["learning rate", "weight decay", "target decay", "kNN of all points, %"]
    return _table(results, ["arm", *heads], rows)


def points(results: Mapping[str, Any]) -> list[str]:
    """Per-view against shared at every point of tuning, where one arm may be more stable than the other."""
    rows = []
    for side, found, method, optimizer in _methods(results):
        shared, per_view = (
            found.tuning(Cell(method=method, variant=arm, optimizer=optimizer, seed=1))
            for arm in ("shared", "per-view")
        )
        common = shared.keys() & per_view.keys()
        if common:
            gaps = [100 * (per_view[name] - shared[name]) for name in common]
            largest = max(
                (point for point in grid(method, optimizer, found.setting) if point.name in common),
                key=lambda point: point.base_lr,
            )
            numbers = [f"{mean(gaps):+.1f}", f"{largest.base_lr:g}"]
            numbers += [f"{100 * tried[largest.name]:.1f}" for tried in (shared, per_view)]
            better = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
            rows.append([side, _title(method, optimizer), better, *numbers])
    heads = [
        "per-view is better at",
        "mean difference",
        "largest learning rate",
        "shared there, %",
        "per-view there, %",
    ]
    return _table(results, heads, rows)


def signs(results: Mapping[str, Any]) -> list[str]:
    """Signs of instability in the second half of the runs: cosines of gradients, and ranks."""
    heads = ["predictor: global", "local", "global/local", "encoder: global", "local", "global/local"]
    rows = []
    for side, found, method, optimizer in _methods(results):
        for variant in ("shared", "per-view"):
            runs = found.runs(method, variant, optimizer)
            if runs:
                cosines = [
                    _late(runs, lambda mark, part=part, pair=pair: mark["cosine"][part].get(pair))
                    for part, pair in product(("predictor", "encoder"), ("global", "local", "global/local"))
                ]
                ranks = [
                    _late(runs, lambda mark: mark["prediction_rank"]["global"], digits=0),
                    _late(runs, lambda mark: mark["prediction_rank"]["local"], digits=0),
                    _late(runs, lambda mark: mark["embedding_rank"], digits=0),
                ]
                rows.append([side, _title(method, optimizer), variant, *cosines, *ranks])
    ranks_heads = ["rank: global predictions", "local predictions", "embeddings"]
    return _table(results, ["arm", *heads, *ranks_heads], rows)


def power(results: Mapping[str, Any]) -> list[str]:
    """Seeds an arm that are needed to see a difference of 2 points between per-view and shared, by test images."""
    rows = []
    for side, found, method, optimizer in _methods(results):
        for measure, title in MEASURES.items():
            parts = difference_components(found, method, optimizer, "per-view", "shared", measure)
            if parts is None:
                continue
            needed = [parts.seeds_for(DIFFERENCE, images) for images in TEST_IMAGES]
            runs = found.runs(method, "shared", optimizer)
            error = 100 * parts.standard_error(len(runs), runs[0]["test_images"])
            shown = [f"{max(2, np.ceil(seeds)):.0f}" if np.isfinite(seeds) else "never" for seeds in needed]
            spread = [f"{100 * parts.seed**0.5:.2f}", f"{error:.2f}"]
            rows.append([side, _title(method, optimizer), title, *spread, *shown])
    heads = ["seeds' own spread, points", "standard error here", *(f"{count:,} test images" for count in TEST_IMAGES)]
    return _table(results, ["top-1", *heads], rows)


def difference_components(
    found: Results, method: str, optimizer: str, one: str, other: str, measure: str
) -> Components | None:
    """Variance components of the difference of two arms; None with fewer than two seeds in common."""
    pairs = _pairs(found, method, optimizer, one, other)
    if len(pairs) < 2:
        return None
    hits = [[unpack(row[f"{measure}_hits"], row["test_images"]).astype(np.float64) for row in pair] for pair in pairs]
    return components(np.stack([a - b for a, b in hits]))


def _difference(pairs: Sequence[tuple[Row, Row]], measure: str) -> str:
    middle, half = (100 * value for value in interval([a[measure] - b[measure] for a, b in pairs]))
    shown = f"{middle:+.1f}"
    return f"{shown} ({middle - half:+.1f} to {middle + half:+.1f})" if np.isfinite(half) else f"{shown} (one seed)"


def _pairs(found: Results, method: str, optimizer: str, one: str, other: str) -> list[tuple[Row, Row]]:
    """Runs of two variants, paired by seed."""
    first, second = (
        {row["cell"]["seed"]: row for row in found.runs(method, variant, optimizer)} for variant in (one, other)
    )
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def _methods(results: Mapping[str, Any]) -> Iterator[tuple[str, Results, str, str]]:
    """Side, results, method and optimiser of everything with a cell."""
    for side, name in NAMES.items():
        if name in results:
            found = results_of(results[name])
            for optimizer, method in product(OPTIMIZERS, METHODS):
                if any((cell.method, cell.optimizer) == (method, optimizer) for cell in found.rows):
                    yield side, found, method, optimizer


def _table(results: Mapping[str, Any], heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows that begin with side and method, and one for each side without results."""
    missing = [[side, NOT_YET] for side, name in NAMES.items() if name not in results]
    return table(["on", "method", *heads], [*rows, *missing], words=3)


def _title(method: str, optimizer: str) -> str:
    return f"{TITLES[method]}, {KIND_TITLES[kind_of(method, optimizer)]}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    shown = f"{100 * mean(values):.1f}"
    return f"{shown} \N{PLUS-MINUS SIGN} {100 * stdev(values):.1f}" if len(values) > 1 else f"{shown} (one seed)"


def _late(runs: Sequence[Row], value: Any, *, digits: int = 2) -> str:
    """Mean over the second half of the marks of all runs; "" where there is nothing."""
    values = [
        found
        for run in runs
        for mark in run["signals"][len(run["signals"]) // 2 :]
        if (found := value(mark)) is not None
    ]
    return f"{mean(values):.{digits}f}" if values else ""


def _origins(results: Mapping[str, Any]) -> list[str]:
    """A line for the origin of each side's cells."""
    lines = []
    for side, name in NAMES.items():
        if name not in results:
            lines.append(f"- {side}: {NOT_YET} (`{MADE_BY[name]}`).")
            continue
        cells = results[name]["cells"]
        setting = Setting(**cells[0]["setting"])
        machines = Counter(machine({**row, "device": "cuda" if side == "GPU" else "cpu"}) for row in cells)
        versions = sorted({f"torch {row['environment']['packages']['torch']}" for row in cells})
        steps = max(row.get("steps", 0) for row in cells)
        test = max(row.get("test_images", 0) for row in cells)
        seeds = Counter(row["cell"]["seed"] for row in cells if row["cell"]["point"] is None)
        diverged = sum("diverged" in row for row in cells)
        said = [
            ", ".join(machines),
            *versions,
            f"{setting.backbone}, initial weights of {INITS[setting.init]}",
            f"{setting.classes} classes of {setting.train_images} images (chance "
            f"{100 / setting.classes:g} %), {test:,} test images",
            f"views of {setting.size} and {setting.local_size} px",
            f"{setting.epochs} epochs ({steps:,} steps of {setting.batch_size} images)",
            f"up to {len(seeds)} seeds, mean \N{PLUS-MINUS SIGN} standard deviation",
            f"{len(cells)} cells, {diverged} of them diverged",
        ]
        lines.append(f"- [{side}](results/{file_of(results, name)}): {', '.join(said)}: `{MADE_BY[name]}`")
    return lines


def all_tables(results: Mapping[str, Any]) -> list[str]:
    """All of them, for a terminal."""
    return [line for make in (accuracies, differences, tuning, points, signs, power) for line in [*make(results), ""]]
