"""The evaluations of mvssl-eval. A new one is a dataclass of arguments, a function, and an entry in `EVALUATIONS`.

What imports torch, which takes seconds, is imported by the functions that need it: help does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from mvssl.cli.pages import PAGES
from mvssl.config.evaluation import (
    FINETUNING,
    RELEASE,
    BackboneSource,
    ComputeOptions,
    EvalOptions,
    FastLinear,
    LabelSubset,
    Supervision,
)
from pipelines.names import NAME, cell, say, say_table
from pipelines.runtime import InputError, invalid, parse_arguments


@dataclass(frozen=True, kw_only=True)
class MeasureArguments:
    """Arguments of every evaluation of one backbone.

    Attributes:
        source: which backbone.
        options: which images, where the results go.
        compute: where and how features are computed.
    """

    source: Annotated[BackboneSource, tyro.conf.arg(name="")]
    options: Annotated[EvalOptions, tyro.conf.arg(name="")] = field(default_factory=EvalOptions)
    compute: Annotated[ComputeOptions, tyro.conf.arg(name="")] = field(default_factory=ComputeOptions)


@dataclass(frozen=True, kw_only=True)
class KnnArguments(MeasureArguments):
    """kNN accuracy of a backbone (PAPER.md section 6: cosine similarity, votes weighted exp(similarity / temperature)).

    Attributes:
        protocol: ours resizes bicubically, release bilinearly as the reference implementation.
        k: numbers of neighbours; by default those of the run's recipe, or 20 and 10.
        temperature: of the votes.
        sheet: number of images to show with their nearest neighbours in OUT/neighbours-NETWORK.png; 0 for none. Without
            labels there is only this sheet.
    """

    protocol: Literal["ours", "release"] = "ours"
    k: tuple[int, ...] = ()
    temperature: tuple[float, ...] = (0.07,)
    sheet: int = 0

    def __post_init__(self) -> None:
        if self.sheet < 0:
            raise invalid("sheet", self.sheet, "0 or more images", "give a small number such as 12")


def run_knn(arguments: Sequence[str]) -> None:
    """Measure, print a table and write OUT/knn-NAME.json."""
    asked = parse_arguments(KnnArguments, prog="mvssl-eval knn", args=arguments)
    from mvssl.evaluate.knn import grid_rows, knn_grid, neighbour_sheet
    from mvssl.evaluate.session import open_session

    evaluation = "knn" if asked.protocol == "ours" else "knn-release"
    with open_session(_source(asked, asked.protocol), asked.options, asked.compute) as session:
        k = asked.k or session.loaded.evaluation.k
        name = session.loaded.name
        if asked.sheet:
            path = session.check_picture(session.out / f"neighbours-{name}.png")
            neighbour_sheet(session, path, images=asked.sheet)
            session.say(f"Neighbours: {path}")
            without = int((session.train.labels < 0).sum())
            if without:
                which = "These" if without == len(session.train) else f"{without:,} of {len(session.train):,}"
                session.say(f"{which} images have no labels, so there is no accuracy.")
                return
        identity = session.identity("knn", k=k, temperature=asked.temperature)
        results, path = session.measure_once(
            evaluation, identity, lambda: knn_grid(session, k=k, temperatures=asked.temperature)
        )
        title = f"kNN top-1{' (release)' if asked.protocol == 'release' else ''}, {session.loaded.architecture}, {name}"
        how = " (leave one out)" if results["leave_one_out"] else ""
        rows = [[*row, f"{results['neighbours']:,}", f"{results['images']:,}{how}"] for row in grid_rows(results)]
        heads = ("k", "temperature", "top-1 %", "95 % interval", "neighbours", "classified")
        _print_table(session.console, title, heads, rows, path, session.conditions())


def _source(asked: MeasureArguments, protocol: str) -> BackboneSource:
    """The backbone's source, with the protocol's interpolation unless one is asked for."""
    bilinear = protocol == "release" and asked.source.interpolation is None
    return dataclasses.replace(asked.source, interpolation="bilinear") if bilinear else asked.source


@dataclass(frozen=True, kw_only=True)
class LinearArguments(MeasureArguments):
    """Linear probe (PAPER.md section 6).

    Attributes:
        protocol: fast computes features once and trains a grid of settings at once; release trains like
            the reference implementation, on new crops in every epoch, resized bilinearly.
        fast: settings of the fast protocol.
        release: settings of the release protocol.
    """

    protocol: Literal["fast", "release"] = "fast"
    fast: FastLinear = field(default_factory=FastLinear)
    release: Supervision = field(default_factory=lambda: RELEASE)


def run_linear(arguments: Sequence[str]) -> None:
    """Measure, print a table and write OUT/linear-PROTOCOL-NAME.json."""
    asked = parse_arguments(LinearArguments, prog="mvssl-eval linear", args=arguments)
    from mvssl.evaluate.linear import fast_linear, release_linear
    from mvssl.evaluate.session import open_session

    with open_session(_source(asked, asked.protocol), asked.options, asked.compute) as session:
        settings = dataclasses.asdict(asked.fast) if asked.protocol == "fast" else asked.release.identity()
        identity = session.identity(f"linear-{asked.protocol}", **settings)

        def measure() -> dict[str, Any]:
            if asked.protocol == "fast":
                return fast_linear(session, asked.fast)
            return release_linear(session, asked.release)

        start = asked.release.head_std if asked.protocol == "release" else 0.0
        results, path = session.measure_once(
            f"linear-{asked.protocol}",
            identity,
            measure,
            head_std=start,
        )
        lr = results.get("lr", asked.release.lr)
        decay = results.get("weight_decay", asked.release.weight_decay)
        row = [*_accuracy_cells(results), f"{lr:g}", f"{decay:g}", f"{results['train_images']:,}"]
        row.append(f"{results['images']:,}")
        heads = ("top-1 %", "95 % interval", "top-5 %", "lr", "decay", "trained on", "measured")
        title = f"Linear probe ({asked.protocol}), {session.loaded.architecture}, {session.loaded.name}"
        _print_table(session.console, title, heads, [row], path, session.conditions(head_std=start))


@dataclass(frozen=True, kw_only=True)
class FinetuneArguments(MeasureArguments):
    """Fine-tune the whole network with all labels, a fraction of them or those of a list.

    Attributes:
        subset: which labels.
        supervision: how it is trained.
        backbone_out: write the fine-tuned backbone to this .safetensors file.
    """

    subset: Annotated[LabelSubset, tyro.conf.arg(name="")] = field(default_factory=LabelSubset)
    supervision: Annotated[Supervision, tyro.conf.arg(name="")] = field(default_factory=lambda: FINETUNING)
    backbone_out: Path | None = None


def run_finetune(arguments: Sequence[str]) -> None:
    """Train, measure, print a table and write OUT/finetune-LABELS-NAME.json."""
    asked = parse_arguments(FinetuneArguments, prog="mvssl-eval finetune", args=arguments)
    from mvssl.evaluate.finetune import finetune
    from mvssl.evaluate.session import open_session

    with open_session(asked.source, asked.options, asked.compute) as session:
        settings = {**asked.supervision.identity(), **dataclasses.asdict(asked.subset)}
        settings["label_list"] = str(asked.subset.label_list)
        results, path = session.measure_once(
            f"finetune-{asked.subset.name()}",
            session.identity("finetune", **settings),
            lambda: finetune(session, asked.supervision, asked.subset, backbone_out=asked.backbone_out),
            head_std=asked.supervision.head_std,
        )
        row = [*_accuracy_cells(results), f"{results['train_images']:,}", f"{results['images']:,}"]
        heads = ("top-1 %", "95 % interval", "top-5 %", "labels", "measured on")
        title = f"Fine-tuned ({asked.subset.name()}), {session.loaded.architecture}, {session.loaded.name}"
        _print_table(
            session.console, title, heads, [row], path, session.conditions(head_std=asked.supervision.head_std)
        )


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Results and curves of several runs, as a table and a plot.

    Attributes:
        runs: run folders, or folders of results (--out of mvssl-eval).
        out: the picture to write; an existing one is replaced.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("compare.png")

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("runs are missing: name one or more run folders.")
        if self.out.suffix != ".png":
            raise InputError(f"out is {str(self.out)!r} but must end in .png: rename it.")


def run_compare(arguments: Sequence[str]) -> None:
    """Print the table and draw the plot."""
    asked = parse_arguments(CompareArguments, prog="mvssl-eval compare", args=arguments)
    from mvssl.evaluate.compare import plot, summarise

    summaries = [summary for path in asked.runs for summary in summarise(path)]
    console = Console()
    measured = list(dict.fromkeys(name for summary in summaries for name in summary.results))
    table = Table(title="top-1 % (95 % interval)", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for summary in summaries:
        table.add_column(cell(summary.name, NAME), justify="right")
    table.add_row("what", *(cell(summary.about) for summary in summaries))
    table.add_row("steps", *(f"{summary.steps:,}" if summary.steps else "" for summary in summaries))
    knn = [summary.curves.get("knn", ([], []))[1] for summary in summaries]
    if any(knn):
        table.add_row("kNN while training", *(f"{values[-1]:.2f}" if values else "" for values in knn))
    for name in measured:
        cells = [summary.results.get(name) for summary in summaries]
        table.add_row(
            cell(name, NAME),
            *(
                "" if cell is None else f"{100 * cell[0]:.2f} ({100 * cell[1]:.1f} to {100 * cell[2]:.1f})"
                for cell in cells
            ),
        )
    say_table(console, table)
    say(console, *dict.fromkeys(line for summary in summaries for line in summary.conditions))
    plot(summaries, asked.out)
    say(console, f"Plot: {asked.out}")


def _print_table(
    console: Console,
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    path: Path,
    conditions: Mapping[str, Any],
) -> None:
    """Print a table of numbers, what they were measured with, and the file that has them."""
    from mvssl.runs.results import describe

    table = Table(box=None, pad_edge=False)
    for column in heads:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(cell, row))
    say(console, title, style="table.title")
    say_table(console, table)
    say(console, f"Measured with: {describe(conditions)}", f"Results: {path}")


def _accuracy_cells(results: dict[str, Any]) -> list[str]:
    """Top-1 with its 95 % interval, and top-5, in per cent."""
    low, high = results["top1_interval_95"]
    top5 = "" if results["top5"] is None else f"{100 * results['top5']:.2f}"
    return [f"{100 * results['top1']:.2f}", f"{100 * low:.1f} to {100 * high:.1f}", top5]


EVALUATIONS: dict[str, Callable[[Sequence[str]], None]] = {
    "knn": run_knn,
    "linear": run_linear,
    "finetune": run_finetune,
    "compare": run_compare,
    **PAGES,
}
