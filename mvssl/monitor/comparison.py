"""Writes one self-contained page that compares several runs: what differs, their curves, their last numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any, NamedTuple

from mvssl.config.recipe import Recipe
from mvssl.config.serialize import flatten, to_dict
from mvssl.monitor.report import Chart, Curve, Row, make_chart, templates
from mvssl.runs.data_record import DataRecord
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_metrics, read_throughput
from mvssl.runs.listing import RunState, run_state
from mvssl.runs.results import read_result
from pipelines.files import read_json, write_whole
from pipelines.names import NAME, visible
from pipelines.progress import duration, rate
from pipelines.runtime import InputError

MOST = 48
"""Runs on a page: six colours times eight patterns of lines."""
_OPTIONS = ("data", "val", "init_from", "value_range")
"""Options that change the numbers of a run."""
_LOSS = ("method", "predictors", "views", "task_weights", "projector", "predictor")
"""Fields of a recipe without which two losses mean different things."""


def write_comparison(path: Path, folders: Sequence[RunFolder]) -> None:
    """Write the page about these runs, finished or not.

    Raises:
        InputError: there are less than two or too many runs, or a folder holds none, or its files are damaged.
        OSError: the page cannot be written; an earlier one is untouched.
    """
    write_whole(path, render(folders))


def render(folders: Sequence[RunFolder]) -> str:
    """The page as HTML."""
    if not 2 <= len(folders) <= MOST:
        raise InputError(
            f"report was given {len(folders)} runs to compare but takes 2 to {MOST}: name fewer of them, or a folder "
            "with fewer runs."
        )
    runs = [_load(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]
    return (
        templates()
        .get_template("compare.html.j2")
        .render(
            runs=runs,
            differences=differences(runs),
            notes=notes(runs),
            numbers=numbers(runs),
            by_step=_charts(runs, lambda run: 1.0),
            by_epoch=_charts(runs, lambda run: None if run.per_epoch is None else 1 / run.per_epoch),
            styles={run.label: f"c{n % 6} d{n // 6}" for n, run in enumerate(runs)},
        )
    )


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """What a page shows of a run.

    Attributes:
        label: its shortest name that no other one has.
        folder, recipe, options, state: of the run.
        train, knn, speed: rows of metrics.jsonl and throughput.jsonl.
        evaluations: best top-1 accuracy in [0, 1] of mvssl-eval's results, by evaluation and network.
        machine: cores, processor and GPUs; "" if it is not known.
    """

    label: str
    folder: RunFolder
    recipe: Recipe
    options: Mapping[str, Any]
    state: RunState
    train: Sequence[Row]
    knn: Sequence[Row]
    speed: Sequence[Row]
    evaluations: Mapping[str, float]
    machine: str

    @property
    def per_epoch(self) -> float | None:
        """Steps of an epoch; None if they are not known."""
        return None if not self.state.steps else self.state.steps / self.recipe.epochs


def _load(folder: RunFolder, label: str) -> ComparedRun:
    """Read a run; raises as `write_comparison`."""
    recipe, options = folder.recipe(), folder.options()
    rows = list(read_metrics(folder.metrics)) if folder.metrics.exists() else []
    return ComparedRun(
        label=label,
        folder=folder,
        recipe=recipe,
        options=options,
        state=run_state(folder.path),
        train=[row for row in rows if row["kind"] == "train"],
        knn=[row for row in rows if row["kind"] == "knn"],
        speed=list(read_throughput(folder.throughput)) if folder.throughput.exists() else [],
        evaluations=_evaluations(folder),
        machine=_machine(folder),
    )


def _evaluations(folder: RunFolder) -> dict[str, float]:
    found: dict[str, float] = {}
    for path in sorted(folder.evaluations.glob("*.json")):
        held = read_result(path)
        best = held["results"].get("best", held["results"])
        found[f"{held['evaluation']}, {held['network']} network"] = float(best["top1"])
    return found


def _machine(folder: RunFolder) -> str:
    try:
        held = read_json(folder.environment)
        gpus = ", ".join(map(str, held["gpus"])) or "no GPU"
        return f"{held.get('cores', '?')} cores, {gpus}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def labels(folders: Sequence[RunFolder]) -> list[str]:
    """A name for each run: that of its folder, with as much of its path as tells it from the others."""
    paths = [folder.path.resolve() for folder in folders]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        above = Path(commonpath(paths))
        names = [str(path.relative_to(above)) for path in paths]
    shown = [visible(name, 2 * NAME) for name in names]
    return shown if len(set(shown)) == len(shown) else [f"{n + 1}: {name}" for n, name in enumerate(shown)]


def differences(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Fields of recipes and options that differ, with the value of each run."""
    plain = [dict(flatten(to_dict(run.recipe))) for run in runs]
    for run, fields in zip(runs, plain, strict=True):
        fields |= {name: run.options.get(name) for name in _OPTIONS}
    names = dict.fromkeys(name for fields in plain for name in fields)
    return [
        (name, [_short(fields.get(name, "")) for fields in plain])
        for name in names
        if any(fields.get(name, "") != plain[0].get(name, "") for fields in plain)
    ]


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class Number(NamedTuple):
    """A row of the table of last numbers.

    Attributes:
        name: what is measured.
        values: of each run, as text.
        best: whether it is the best, for each run.
    """

    name: str
    values: list[str]
    best: list[bool]


def numbers(runs: Sequence[ComparedRun]) -> list[Number]:
    """The last numbers of each run; the best is marked where the runs are comparable."""
    found = [
        _number("state", [_state(run) for run in runs]),
        _number("epochs", [f"{_short(run.state.epochs_done)} of {run.recipe.epochs}" for run in runs]),
        _number("steps", [f"{run.state.step:,}" for run in runs]),
        _measured("loss", [_last(run.train, "loss") for run in runs], "{:.4f}", best=min if _same_loss(runs) else None),
    ]
    for name in dict.fromkeys(key for run in runs for key in (run.train[-1] if run.train else {})):
        if name.startswith("loss/"):
            best = min if _same_loss(runs) else None
            found.append(_measured(name, [_last(run.train, name) for run in runs], "{:.4f}", best=best))
    percent = "{:.2f} %"
    top = None if _other_data(runs) or _knn_differs(runs) else max
    for name in dict.fromkeys(key for run in runs for row in run.knn[-1:] for key in row if key[:6] == "top1_k"):
        accuracy = f"kNN top-1, k={name.removeprefix('top1_k')}"
        last = [_percent(_last(run.knn, name)) for run in runs]
        highest = [_percent(max((row[name] for row in run.knn if name in row), default=None)) for run in runs]
        found += [
            _measured(f"{accuracy}, last", last, percent, best=top),
            _measured(f"{accuracy}, highest", highest, percent, best=top),
        ]
    for name in dict.fromkeys(name for run in runs for name in run.evaluations):
        found.append(_measured(name, [_percent(run.evaluations.get(name)) for run in runs], percent, best=max))
    same_machine = _same(run.machine for run in runs)
    found += [
        _measured(
            "source images/s",
            [_weighted(run.speed, "images_per_second") for run in runs],
            rate,
            best=max if same_machine else None,
        ),
        _measured("data wait", [_percent(_weighted(run.speed, "data_wait")) for run in runs], "{:.1f} %"),
        _measured("training time", [sum(row["seconds"] for row in run.speed) or None for run in runs], duration),
        _measured(
            "peak memory",
            [max((row["memory_gib"] for row in run.speed), default=None) for run in runs],
            "{:.2f} GiB",
            best=min if same_machine else None,
        ),
        _measured("effective rank", [_last(run.train, "effective_rank") for run in runs], "{:.1f}"),
        _number("machine", [run.machine for run in runs]),
    ]
    return [row for row in found if any(row.values)]


def _number(name: str, values: list[str]) -> Number:
    return Number(name, values, [False] * len(values))


def _measured(
    name: str,
    values: Sequence[float | None],
    written: str | Callable[[float], str],
    *,
    best: Callable[[Iterable[float]], float] | None = None,
) -> Number:
    """A row of numbers; `best` is min or max, and marks nothing where all runs are equal or only one has a number."""
    known = [value for value in values if value is not None]
    write = written.format if isinstance(written, str) else written
    target = best(known) if best is not None and len(set(known)) > 1 else None
    return Number(
        name,
        ["" if value is None else write(value) for value in values],
        [value is not None and value == target for value in values],
    )


def _state(run: ComparedRun) -> str:
    state = run.state
    return f"stopped by {state.stopped_by}" if state.stopped_by is not None else state.state


def _last(rows: Sequence[Row], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _weighted(rows: Sequence[Row], name: str) -> float | None:
    """Mean over the time of throughput.jsonl's rows."""
    seconds = sum(row["seconds"] for row in rows)
    return sum(row[name] * row["seconds"] for row in rows) / seconds if seconds > 0 else None


def _same_loss(runs: Sequence[ComparedRun]) -> bool:
    return _same(tuple(getattr(run.recipe, name) for name in _LOSS) for run in runs) and not _other_data(runs)


def _same(values: Iterable[Any]) -> bool:
    first, *others = list(values)
    return all(value == first for value in others)


def _knn_differs(runs: Sequence[ComparedRun]) -> bool:
    """Whether kNN accuracies of one k mean different things: of other validation images, or other crops."""
    measured = [
        (_validation(run), {name: value for name, value in _meaning_of_knn(run.recipe).items() if name != "k"})
        for run in runs
        if run.knn
    ]
    return bool(measured) and not _same(measured)


def _meaning_of_knn(recipe: Recipe) -> dict[str, Any]:
    """The fields of the evaluation that decide what an accuracy means."""
    plain: dict[str, Any] = to_dict(recipe)["evaluation"]
    return {name: value for name, value in plain.items() if name != "every_epochs"}


def _validation(run: ComparedRun) -> tuple[Any, ...]:
    """Where validation images come from: --val, else the folder of the data."""
    val = run.options.get("val")
    return ("val", val) if val is not None else ("data", run.options.get("data"))


def _other_data(runs: Sequence[ComparedRun]) -> list[str]:
    """Runs on other images than the first one, each with how they differ."""
    first = runs[0]
    record = DataRecord.load(first.folder.data)
    told = []
    for run in runs[1:]:
        other = DataRecord.load(run.folder.data)
        if record is None or other is None:
            if run.options.get("data") != first.options.get("data"):
                told.append(f"{run.label} was trained on {run.options.get('data')}, {first.label} on other images")
        elif found := record.differences(other):
            told.append(f"{run.label} was trained on other images than {first.label}: {'; '.join(found)}")
    return told


def notes(runs: Sequence[ComparedRun]) -> list[str]:
    """Sentences on what makes runs incomparable; none if nothing does."""
    told = [f"{text}." for text in _other_data(runs)]
    measured = [run for run in runs if run.knn]
    for name in _meaning_of_knn(runs[0].recipe):
        values = {run.label: _meaning_of_knn(run.recipe)[name] for run in measured}
        if measured and not _same(values.values()):
            each = ", ".join(f"{label} {_short(value)}" for label, value in values.items())
            told.append(f"kNN is not comparable: evaluation.{name} differs ({each}).")
    if measured and not _same(map(_validation, measured)):
        each = ", ".join(f"{run.label} {_validation(run)[1]}" for run in measured)
        told.append(f"kNN may not be comparable: the validation images come from other places ({each}).")
    if not _same(tuple(getattr(run.recipe, name) for name in _LOSS) for run in runs):
        told.append("Losses are not comparable: methods, views, predictors or heads differ.")
    if not _same(run.recipe.batch_size for run in runs):
        told.append("Batch sizes differ: compare by epoch, for a step has more images in some runs than in others.")
    if not _same(run.recipe.epochs for run in runs):
        told.append("The planned epochs differ, and with them the schedules: only the ends of runs compare.")
    if not _same(run.machine for run in runs):
        told.append("Speeds are not comparable: the machines differ.")
    for run in runs:
        if run.state.state != "finished":
            told.append(f"{run.label} is not finished ({_state(run)}): its numbers are not its last.")
        for change in run.options.get("changes") or ():
            told.append(
                f"{run.label}: from step {change['step']} on {change['field']} is {_short(change['now'])} instead of "
                f"{_short(change['was'])}."
            )
    return told


def _charts(runs: Sequence[ComparedRun], scale: Callable[[ComparedRun], float | None]) -> list[Chart]:
    """The overlaid curves, over steps times `scale`; a run without one is left out."""
    scales = {run.label: scale(run) for run in runs}
    tasks = dict.fromkeys(key for run in runs for row in run.train[:1] for key in row if key.startswith("loss/"))

    neighbours = dict.fromkeys(str(run.state.k) for run in runs if run.state.k is not None)

    def overlaid(
        title: str, rows: Callable[[ComparedRun], Sequence[Row]], name: str, factor: float = 1.0
    ) -> Chart | None:
        curves: dict[str, Curve] = {}
        for run in runs:
            across = scales[run.label]
            if across is not None:
                curves[run.label] = [
                    (across * row["step"], factor * row[name]) for row in rows(run) if row.get(name) is not None
                ]
        return make_chart(title, curves)

    charts = [
        overlaid("Loss", lambda run: run.train, "loss"),
        overlaid(f"kNN top-1, % (k={', '.join(neighbours)})", lambda run: run.knn, "top1", 100),
        *(overlaid(f"Loss of {name.removeprefix('loss/')}", lambda run: run.train, name) for name in tasks),
        overlaid("Learning rate", lambda run: run.train, "lr"),
        overlaid("Source images/s", lambda run: run.speed, "images_per_second"),
        overlaid("Effective rank of the embeddings", lambda run: run.train, "effective_rank"),
    ]
    return [chart for chart in charts if chart is not None]
