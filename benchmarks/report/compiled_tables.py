"""The tables of the step compiled for a GPU: each function takes all results by name and returns Markdown lines."""

from __future__ import annotations

from benchmarks.harness.results import Result
from benchmarks.report.cells import count, stacked
from benchmarks.report.markdown import significant, table
from benchmarks.report.origins import COMPILED, NOT_YET, Results, compiled_name, origins

_MODELS = {"byol_resnet50_200ep": "ResNet-50", "byol_vits16_200ep": "ViT-S", "byol_vitb16_200ep": "ViT-B"}
COMPILED_SIDES = {
    f"{_MODELS.get(recipe, recipe)}, {target}": compiled_name(recipe, target) for recipe, _, target in COMPILED
}
_KINDS_SHOWN = 12


PART_HEADS = (
    "part",
    "launches",
    "of them Triton",
    "of them library",
    "floor",
    "MB an image",
    "floor",
    "GFLOP an image",
    "predicted, ms",
)


def compiled_steps(results: Results) -> list[str]:
    """Each step of bench_compile, part by part, and the floor if there is one."""
    lines = stacked(results, COMPILED_SIDES, PART_HEADS, part_rows, label="step")
    return [*lines, "", *origins(results, COMPILED_SIDES, _compiled_settings)]


def part_rows(result: Result) -> list[list[str]]:
    """Rows of one result of bench_compile: its parts, the compiled graphs, the whole step and the view engine."""
    least = result["floor"] or {"launches": {}, "megabytes_per_image": {}, "total": {}}
    total = [least["total"].get(name) for name in ("launches", "megabytes_per_image")]
    parts = result["parts"]
    counted = {name: sum(own[name] for own in parts.values()) for name in ("triton_launches", "library_calls")}
    named = {name: result[name] for name in ("launches", "megabytes_per_image", "gflops_per_image")}
    whole = counted | named | {"milliseconds": result["predicted_milliseconds"]}
    return [
        *(
            _part_row(part, own, least["launches"].get(part), least["megabytes_per_image"].get(part))
            for part, own in parts.items()
        ),
        _part_row("**compiled graphs**", result["compiled"], *total),
        _part_row("**step**", whole),
        _part_row("view engine", result["view_engine"]),
    ]


def _part_row(part: str, own: Result, launches: int | None = None, megabytes: float | None = None) -> list[str]:
    """One part; cells without a number are blank."""
    counts = (own["launches"], own["triton_launches"], own["library_calls"], launches)
    numbers = (own["megabytes_per_image"], megabytes, own["gflops_per_image"], own["milliseconds"])
    return [part, *map(count, counts), *(significant(number or None) for number in numbers)]


def compiled_kernels(results: Results) -> list[str]:
    """Kinds of kernels of the main recipe and of a ViT, the largest traffic first."""

    def rows_of(result: Result) -> list[list[str]]:
        return [
            [
                own["part"],
                f"`{_short(own['name'])}`",
                count(own["launches"]),
                *(significant(own[name] or None) for name in ("megabytes_per_image", "gflops_per_image")),
            ]
            for own in result["kinds"][:_KINDS_SHOWN]
        ]

    sides = {side: COMPILED_SIDES[side] for side in ("ResNet-50, sm_90", "ViT-S, sm_90")}
    heads = ["part", "kernel", "launches", "MB an image", "GFLOP an image"]
    return stacked(results, sides, heads, rows_of, words=3, label="step")


def compiled_resources(results: Results) -> list[str]:
    """Registers of the kernels with the largest traffic in the main recipe."""
    heads = ["part", "kernel", "launches", "MB an image", "registers", "spilled, bytes", "shared, bytes"]
    main = results.get(COMPILED_SIDES["ResNet-50, sm_90"])
    if main is None:
        return table(heads, [[NOT_YET]], words=2)
    rows = [
        [
            own["part"],
            f"`{_short(own['name'])}`",
            count(own["launches"]),
            significant(own["megabytes_per_image"]),
            *(f"{own[name]:,}" for name in ("registers", "spilled", "shared")),
        ]
        for own in main["largest"]
        if "registers" in own
    ]
    return table(heads, rows, words=2)


def _short(name: str) -> str:
    """A kernel's name without the operations in the middle, which can be a dozen."""
    return name if len(name) <= 60 else f"{name[:45]}...{name[-12:]}"


def _compiled_settings(result: Result) -> list[str]:
    steps = f", {result['accumulate']} micro-batches" if result["accumulate"] > 1 else ""
    return [f"`{result['recipe']}`", f"batch {result['batch_size']}{steps}", result["precision"], result["target"]]
