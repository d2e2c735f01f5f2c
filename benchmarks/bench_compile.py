"""Launches and memory traffic of a recipe's step on a GPU, from the compiler's schedule, on any machine.

python -m benchmarks.bench_compile RECIPE [--batch-size N] [--target sm_90] [--step-mode per-view]
    [--checkpointing] [--out FILE]

Generates the step's code for the target without a GPU and computes nothing, so any batch size fits. Counted are the
compiled graphs (Triton kernels and library calls), the optimiser's update with the gradient's norm and clipping, the
EMA, the copies of views into the graph's inputs, and the view engine. benchmarks/COMPILED.md lists the assumptions, and
how well the predicted time fits a trace.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.compiled.fake_gpu import capability, check_torch, resources
from benchmarks.compiled.floor import floor
from benchmarks.compiled.gpu_code import Graph
from benchmarks.compiled.roofline import MEASURED, Rates, milliseconds
from benchmarks.compiled.step_code import StepCode, compile_step
from benchmarks.harness.command import command_of
from benchmarks.harness.results import Result, measured_by, write_result
from benchmarks.report.compiled_tables import PART_HEADS, part_rows
from benchmarks.report.markdown import significant, table
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.recipes.files import resolve_recipe
from pipelines.runtime import parse_arguments, run_cli

PROG = "python -m benchmarks.bench_compile"
LARGEST = 15
"""Kernels that a result lists one by one."""

GRAPHS = {"inference": "target forward", "forward": "online forward", "backward": "backward"}
"""Parts of a step by the kind of their graphs."""

_LAYERS = 4  # named of one kernel


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Count the launches and the traffic of a recipe's step on a GPU.

    Attributes:
        recipe: name or file.
        batch_size: images of a step; None takes the recipe's own.
        target: generation of the GPU: sm_80 (A100), sm_90 (H100), sm_100 (B200).
        step_mode: joint or per-view.
        accumulate: micro-batches of a step; None takes the recipe's own.
        precision: None takes the recipe's own; auto is bf16.
        ungrouped: do not batch views of one size.
        checkpointing: compute the activations of the backbone's blocks again in the backward.
        resources: Triton kernels whose registers and spilled bytes are reported.
        out: JSON file, or a .jsonl file in which it replaces the result of the same command.
    """

    recipe: tyro.conf.Positional[str]
    batch_size: int | None = None
    target: str = "sm_90"
    step_mode: Literal["joint", "per-view"] = "joint"
    accumulate: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    ungrouped: bool = False
    checkpointing: bool = False
    resources: Literal["all", "largest", "none"] = "largest"
    out: Path | None = None


@dataclass(kw_only=True)
class Row:
    """Launches of one kernel in one part of a step.

    Attributes:
        part: target forward, online forward or backward.
        name: of the kernel; Triton kernels that differ have names that differ.
        launches: in a step.
        megabytes, gflops: of all of them together.
        layers: their modules.
        source: generated source of a Triton kernel.
    """

    part: str
    name: str
    launches: int = 0
    megabytes: float = 0.0
    gflops: float = 0.0
    layers: dict[str, None] = field(default_factory=dict)
    source: str | None = None


def chosen(arguments: Arguments) -> Recipe:
    """The recipe with the changes of the command line."""
    recipe = resolve_recipe(arguments.recipe)
    names = ("batch_size", "accumulate", "precision")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return replace(recipe, **given)


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Compile and count; the result as plain JSON values.

    Raises:
        InputError: torch, the target or the recipe is unknown, Triton is missing, or the step does not compile.
    """
    check_torch()
    capability(arguments.target)
    recipe = chosen(arguments)
    code = compile_step(
        recipe,
        target=arguments.target,
        step_mode=arguments.step_mode,
        group_views=not arguments.ungrouped,
        checkpointing=arguments.checkpointing,
    )
    return summary(code, recipe, arguments) | measured_by(command)


def summary(code: StepCode, recipe: Recipe, arguments: Arguments) -> dict[str, Any]:
    """The result of a compiled step.

    Bytes are per source image, launches and milliseconds per step. The totals at the top are those of the step on
    finished views; the view engine has a row of its own.
    """
    rates = MEASURED.get(arguments.target)
    images = recipe.batch_size
    parts = {
        name: _of_graphs([graph for graph in code.graphs if graph.kind == kind], images, rates)
        for kind, name in GRAPHS.items()
        if any(graph.kind == kind for graph in code.graphs)
    }
    compiled = _total(parts.values())
    parts |= {
        name: _part(eager=work.launches, megabytes=work.megabytes, images=images, rates=rates)
        for name, work in sorted(code.eager.items())
    }
    total = _total(parts.values())
    views = _part(triton=code.views.launches, megabytes=code.views.megabytes, images=images, rates=rates)
    if rates is not None:
        views["milliseconds"] = 1e9 * code.views.megabytes / rates.views
    rows = rows_of(code.graphs)
    saved = [graph.saved_megabytes for graph in code.graphs if graph.kind == "forward"]
    least = floor(
        recipe,
        step_mode=arguments.step_mode,
        group_views=not arguments.ungrouped,
        target_network="target forward" in parts,
    )
    return {
        "benchmark": "compile",
        "recipe": recipe.name,
        "batch_size": images,
        "target": arguments.target,
        "megabytes_per_image": total["megabytes_per_image"],
        "launches": total["launches"],
        "predicted_milliseconds": total["milliseconds"],
        "gflops_per_image": total["gflops_per_image"],
        "precision": "bf16" if recipe.precision == "auto" else recipe.precision,
        "step_mode": arguments.step_mode,
        "accumulate": recipe.accumulate,
        "grouped": not arguments.ungrouped,
        "checkpointing": arguments.checkpointing,
        # One forward's at a time: a backward follows each.
        "saved_megabytes_per_image": max(saved, default=0.0) / images,
        "views_per_image": len(recipe.views),
        "compiled": compiled,
        "parts": parts,
        "floor": None if least is None else asdict(least) | {"total": least.total},
        "view_engine": views,
        "kinds": _kinds(rows, images),
        "largest": _largest(rows, images, arguments),
        "resources": _resources(rows, arguments) if arguments.resources == "all" else None,
        "settings": to_dict(recipe),
    }


def rows_of(graphs: Sequence[Graph]) -> list[Row]:
    """The kernels of a step, the largest traffic first; library calls by their layer."""
    rows: dict[tuple[int, str, str], Row] = {}
    for number, graph in enumerate(graphs):
        for kernel in graph.kernels:
            layer = "" if kernel.source else next(iter(kernel.layers), "")
            where = (number, kernel.source or kernel.name, layer)
            row = rows.setdefault(where, Row(part=GRAPHS[graph.kind], name=kernel.source or kernel.name))
            row.launches += graph.calls
            row.megabytes += graph.calls * kernel.megabytes
            row.gflops += graph.calls * kernel.gflops
            row.layers |= dict.fromkeys(kernel.layers)
            row.source = graph.sources.get(kernel.source)
    return sorted((row for row in rows.values() if row.launches), key=lambda row: -row.megabytes)


def _of_graphs(graphs: Sequence[Graph], images: int, rates: Rates | None) -> dict[str, Any]:
    """A part of the step: all calls of its graphs."""
    kernels = [(graph.calls, kernel) for graph in graphs for kernel in graph.kernels]
    return _part(
        triton=sum(graph.calls * graph.triton_launches for graph in graphs),
        library=sum(graph.calls * graph.library_calls for graph in graphs),
        megabytes=sum(calls * kernel.megabytes for calls, kernel in kernels if not kernel.library),
        library_megabytes=sum(calls * kernel.megabytes for calls, kernel in kernels if kernel.library),
        gflops=sum(calls * kernel.gflops for calls, kernel in kernels if kernel.library),
        images=images,
        rates=rates,
    )


def _part(
    *,
    images: int,
    rates: Rates | None,
    megabytes: float,
    triton: int = 0,
    library: int = 0,
    eager: int = 0,
    library_megabytes: float = 0.0,
    gflops: float = 0.0,
) -> dict[str, Any]:
    """Numbers of one part of a step."""
    return {
        "triton_launches": triton,
        "library_calls": library,
        "eager_launches": eager,
        "launches": triton + library + eager,
        "megabytes_per_image": (megabytes + library_megabytes) / images,
        "library_megabytes_per_image": library_megabytes / images,
        "gflops_per_image": gflops / images,
        "milliseconds": None if rates is None else milliseconds(rates, megabytes=megabytes, gflops=gflops),
    }


def _total(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of parts."""
    rows = list(parts)
    return {
        name: None if any(row[name] is None for row in rows) else sum(row[name] for row in rows) for name in rows[0]
    }


def _kinds(rows: Sequence[Row], images: int) -> list[dict[str, Any]]:
    """Kernels by part and kind, the number at the end of their names left out."""
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        name = row.name.rstrip("0123456789").rstrip("_") if row.source else row.name
        own = kinds.setdefault(
            (row.part, name),
            {"part": row.part, "name": name, "launches": 0, "megabytes_per_image": 0.0, "gflops_per_image": 0.0},
        )
        own["launches"] += row.launches
        own["megabytes_per_image"] += row.megabytes / images
        own["gflops_per_image"] += row.gflops / images
    return sorted(kinds.values(), key=lambda own: -float(own["megabytes_per_image"]))[: 2 * LARGEST]


def _largest(rows: Sequence[Row], images: int, arguments: Arguments) -> list[dict[str, Any]]:
    """The kernels with the largest traffic."""
    found = []
    for row in rows[:LARGEST]:
        own = {
            "part": row.part,
            "name": row.name,
            "layers": [*row.layers][:_LAYERS],
            "more_layers": max(0, len(row.layers) - _LAYERS),
            "launches": row.launches,
            "megabytes_per_image": row.megabytes / images,
            "gflops_per_image": row.gflops / images,
        }
        if row.source is not None and arguments.resources != "none":
            own |= asdict(resources(row.source, target=arguments.target))
        found.append(own)
    return found


def _resources(rows: Sequence[Row], arguments: Arguments) -> dict[str, Any]:
    """Registers and spilled bytes of all Triton kernels."""
    found = [asdict(resources(row.source, target=arguments.target)) for row in rows if row.source is not None]
    return {
        "kernels": len(found),
        "spilling": sum(own["spilled"] > 0 for own in found),
        "most_registers": max((own["registers"] for own in found), default=0),
        "most_spilled": max((own["spilled"] for own in found), default=0),
    }


def show(result: Result) -> list[str]:
    """Markdown tables of a result."""
    rows = []
    for own in result["largest"]:
        more = f", {own['more_layers']} more" if own["more_layers"] else ""
        numbers = [f"{own['launches']:,}", *(significant(own[f"{unit}_per_image"]) for unit in ("megabytes", "gflops"))]
        registers = [str(own.get(name, "")) for name in ("registers", "spilled")]
        rows.append([own["part"], own["name"], ", ".join(own["layers"][:2]) + more, *numbers, *registers])
    heads = ["part", "kernel", "layers", "launches", "MB an image", "GFLOP an image", "registers", "spilled bytes"]
    return [
        f"{result['recipe']}, batch {result['batch_size']}, {result['precision']}, {result['target']}",
        "",
        f"Activations kept for the backward: {significant(result['saved_megabytes_per_image'])} MB an image"
        + (", with checkpointing" if result["checkpointing"] else ""),
        "",
        *table(PART_HEADS, part_rows(result)),
        "",
        "The kernels with the largest traffic:",
        "",
        *table(heads, rows, words=3),
    ]


def body() -> int:
    """Run the command; returns the exit code."""
    arguments = parse_arguments(Arguments, prog=PROG)
    result = measure(arguments, command=command_of(PROG, sys.argv[1:]))
    lines = "\n".join(show(result))
    console = Console()
    if console.is_terminal:
        console.print(Markdown(lines))
    else:
        print(lines)
    write_result(arguments.out, result)
    return 0


if __name__ == "__main__":
    run_cli(body)
