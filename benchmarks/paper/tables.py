"""The results of the paper's comparison as Markdown tables, a function each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from benchmarks.paper.results import Results, Row, cosine
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
Tables = Mapping[str, Any]
Pairs = list[tuple[Row, Row]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """All cells of one method and optimiser on one side."""

    side: str
    found: Results
    method: str
    optimizer: str

    @property
    def label(self) -> list[str]:
        """The first cells of its rows."""
        return [self.side, f"{TITLES[self.method]}, {KIND_TITLES[kind_of(self.method, self.optimizer)]}"]

    def cell(self, arm: str) -> Cell:
        """A cell of an arm; its seed does not matter to tuning."""
        return Cell(method=self.method, variant=arm, optimizer=self.optimizer, seed=1)

    def runs(self, variant: str) -> list[Row]:
        """Finished runs of a variant, by seed."""
        return self.found.runs(self.method, variant, self.optimizer)

    def pairs(self, one: str, other: str) -> Pairs:
        """Runs of two variants, paired by seed."""
        first, second = ({row["cell"]["seed"]: row for row in self.runs(variant)} for variant in (one, other))
        return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]

    def components(self, one: str, other: str, measure: str) -> Components | None:
        """Variance components of the difference of two arms; None with fewer than two seeds in common."""
        pairs = self.pairs(one, other)
        if len(pairs) < 2:
            return None
        hits = [
            [unpack(row[f"{measure}_hits"], row["test_images"]).astype(np.float64) for row in pair] for pair in pairs
        ]
        return components(np.stack([a - b for a, b in hits]))


def groups(results: Tables) -> Iterator[Group]:
    """Every group with a cell."""
    for side, name in NAMES.items():
        if name in results:
            cells: list[Row] = list(results[name]["cells"])
            found = Results(Setting(**cells[0]["setting"]), cells)
            for optimizer, method in product(OPTIMIZERS, METHODS):
                if any((cell.method, cell.optimizer) == (method, optimizer) for cell in found.rows):
                    yield Group(side=side, found=found, method=method, optimizer=optimizer)


def accuracies(results: Tables) -> list[str]:
    """Top-1 of every method and variant, mean and standard deviation over seeds."""
    rows = []
    for group, (measure, title) in product(groups(results), MEASURES.items()):
        cells = [_mean_and_deviation([row[measure] for row in group.runs(variant)]) for variant in VARIANTS]
        if any(cells):
            rows.append([*group.label, title, *cells])
    return [*_table(results, ["top-1", *VARIANTS], rows), "", *_origins(results)]


def differences(results: Tables) -> list[str]:
    """Differences of arms in points, with 95 % intervals over seeds; last over all runs of a side together."""
    rows = []
    pooled: dict[tuple[str, str], list[Pairs]] = {}
    for group, (one, other) in product(groups(results), COMPARED):
        pairs, what = group.pairs(one, other), f"{one} less {other}"
        if pairs:
            rows.append([*group.label, what, *(_difference(pairs, measure) for measure in MEASURES)])
            pooled.setdefault((group.side, what), []).append(pairs)
    for (side, what), parts in pooled.items():
        if len(parts) > 1:
            pairs = [pair for part in parts for pair in part]
            rows.append([side, f"all {len(pairs)} pairs", what, *(_difference(pairs, name) for name in MEASURES)])
    return _table(results, ["difference", *MEASURES.values()], rows)


def tuning(results: Tables) -> list[str]:
    """The point that tuning chose for each arm, and the range over all points."""
    rows = []
    for group, arm in product(groups(results), ARMS):
        point, tried = group.found.point(group.cell(arm)), group.found.tuning(group.cell(arm))
        shown = f"{100 * min(tried.values()):.1f} to {100 * max(tried.values()):.1f}" if tried else ""
        taken = next((run for run in group.runs(arm) if "point_from" in run), None)
        if point is None and taken is not None:
            point, shown = Point(**taken["point"]), f"as in {taken['point_from']['results']}"
        if point is not None:
            momentum = "" if group.method == "simsiam" else f"{point.target_decay:g}"
            rows.append([*group.label, arm, f"{point.base_lr:.3g}", f"{point.weight_decay:g}", momentum, shown])
    heads = ["learning rate", "weight decay", "EMA momentum", "kNN of all points, %"]
    return _table(results, ["arm", *heads], rows)


def points(results: Tables) -> list[str]:
    """Per-view against shared at every point of tuning, where one arm may be more stable than the other."""
    rows = []
    for group in groups(results):
        shared, per_view = (group.found.tuning(group.cell(arm)) for arm in ("shared", "per-view"))
        common = [
            point
            for point in grid(group.method, group.optimizer, group.found.setting)
            if point.name in shared.keys() & per_view.keys()
        ]
        if common:
            gaps = [100 * (per_view[point.name] - shared[point.name]) for point in common]
            largest = max(common, key=lambda point: point.base_lr)
            there = [f"{100 * tried[largest.name]:.1f}" for tried in (shared, per_view)]
            better = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
            rows.append([*group.label, better, f"{mean(gaps):+.1f}", f"{largest.base_lr:g}", *there])
    heads = ["mean difference", "largest learning rate", "shared there, %", "per-view there, %"]
    return _table(results, ["per-view is better at", *heads], rows)


def signs(results: Tables) -> list[str]:
    """Signs of instability in the second half of the runs: cosines of gradients, and ranks."""
    cosines = ["predictor: global", "local", "global/local", "encoder: global", "local", "global/local"]
    ranks = ["rank: global predictions", "local predictions", "embeddings"]
    rows = []
    for group, variant in product(groups(results), ("shared", "per-view")):
        if runs := group.runs(variant):
            cells = [
                _late(runs, partial(cosine, part, pair))
                for part, pair in product(("predictor", "encoder"), ("global", "local", "global/local"))
            ]
            cells += [
                _late(runs, lambda mark: mark["prediction_rank"]["global"], digits=0),
                _late(runs, lambda mark: mark["prediction_rank"]["local"], digits=0),
                _late(runs, lambda mark: mark["embedding_rank"], digits=0),
            ]
            rows.append([*group.label, variant, *cells])
    return _table(results, ["arm", *cosines, *ranks], rows)


def power(results: Tables) -> list[str]:
    """Seeds an arm that are needed to see a difference of 2 points between per-view and shared, by test images."""
    rows = []
    for group, (measure, title) in product(groups(results), MEASURES.items()):
        parts = group.components("per-view", "shared", measure)
        if parts is not None:
            needed = [parts.seeds_for(DIFFERENCE, images) for images in TEST_IMAGES]
            runs = group.runs("shared")
            error = 100 * parts.standard_error(len(runs), runs[0]["test_images"])
            shown = [f"{max(2, np.ceil(seeds)):.0f}" if np.isfinite(seeds) else "never" for seeds in needed]
            rows.append([*group.label, title, f"{100 * parts.seed**0.5:.2f}", f"{error:.2f}", *shown])
    heads = ["seeds' own spread, points", "standard error here", *(f"{count:,} test images" for count in TEST_IMAGES)]
    return _table(results, ["top-1", *heads], rows)


def all_tables(results: Tables) -> list[str]:
    """All of them, for a terminal."""
    return [line for make in (accuracies, differences, tuning, points, signs, power) for line in [*make(results), ""]]


def _table(results: Tables, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows that begin with side and method, and one for each side without results."""
    missing = [[side, NOT_YET] for side, name in NAMES.items() if name not in results]
    return table(["on", "method", *heads], [*rows, *missing], words=3)


def _difference(pairs: Pairs, measure: str) -> str:
    middle, half = (100 * value for value in interval([a[measure] - b[measure] for a, b in pairs]))
    shown = f"{middle:+.1f}"
    return f"{shown} ({middle - half:+.1f} to {middle + half:+.1f})" if np.isfinite(half) else f"{shown} (one seed)"


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return ""
    shown = f"{100 * mean(values):.1f}"
    return f"{shown} \N{PLUS-MINUS SIGN} {100 * stdev(values):.1f}" if len(values) > 1 else f"{shown} (one seed)"


def _late(runs: Sequence[Row], value: Callable[[Any], float | None], *, digits: int = 2) -> str:
    """Mean over the second half of the checkpoints of all runs; "" if there is nothing."""
    marks = [mark for run in runs for mark in run["signals"][len(run["signals"]) // 2 :]]
    values = [found for mark in marks if (found := value(mark)) is not None]
    return f"{mean(values):.{digits}f}" if values else ""


def _origins(results: Tables) -> list[str]:
    """A line for the origin of each side's cells."""
    lines = []
    for side, name in NAMES.items():
        if name not in results:
            lines.append(f"- {side}: {NOT_YET} (`{MADE_BY[name]}`).")
            continue
        cells = results[name]["cells"]
        setting = Setting(**cells[0]["setting"])
        machines = Counter(machine({**row, "device": "cuda" if side == "GPU" else "cpu"}) for row in cells)
        steps = max(row.get("steps", 0) for row in cells)
        seeds = {row["cell"]["seed"] for row in cells if row["cell"]["point"] is None}
        said = [
            ", ".join(machines),
            *sorted({f"torch {row['environment']['packages']['torch']}" for row in cells}),
            f"{setting.backbone}, initial weights of {INITS[setting.init]}",
            f"{setting.classes} classes of {setting.train_images} images (chance {100 / setting.classes:g} %), "
            f"{max(row.get('test_images', 0) for row in cells):,} test images",
            f"views of {setting.size} and {setting.local_size} px",
            f"{setting.epochs} epochs ({steps:,} steps of {setting.batch_size} images)",
            f"up to {len(seeds)} seeds, mean \N{PLUS-MINUS SIGN} standard deviation",
            f"{len(cells)} cells, {sum('diverged' in row for row in cells)} of them diverged",
        ]
        lines.append(f"- [{side}](results/{file_of(results, name)}): {', '.join(said)}: `{MADE_BY[name]}`")
    return lines
