"""Tables of bench_compile: what steps launch and move on a GPU, by part and by kernel."""

from __future__ import annotations

from benchmarks.report.markdown import table
from benchmarks.report.origins import FOLDER, NOT_YET, Result, Results, origin
from benchmarks.report.rounding import significant

SIDES = {
    "ResNet-50, sm_90": "compile_byol_resnet50_200ep_sm90",
    "ResNet-50, sm_80": "compile_byol_resnet50_200ep_sm80",
    "ResNet-50, sm_100": "compile_byol_resnet50_200ep_sm100",
    "ViT-S, sm_90": "compile_byol_vits16_200ep_sm90",
    "ViT-B, sm_90": "compile_byol_vitb16_200ep_sm90",
    "laptop, sm_90": "compile_laptop_sm90",
}
"""Each result by what a reader calls it."""

MAIN = "compile_byol_resnet50_200ep_sm90"
_SHOWN = 12  # kinds of kernels in a table


def steps(results: Results) -> list[str]:
    """Each step, part by part, and the floor where there is one."""
    heads = [
        "launches",
        "of them Triton",
        "of them library",
        "floor",
        "MB an image",
        "floor",
        "GFLOP an image",
        "predicted, ms",
    ]
    rows: list[list[str]] = []
    for side, name in SIDES.items():
        if name not in results:
            rows.append([side, NOT_YET])
            continue
        result = results[name]
        least = result["floor"] or {"launches": {}, "megabytes_per_image": {}, "total": {}}
        for part, own in result["parts"].items():
            rows.append([side, part, *_cells(own, least["launches"].get(part), least["megabytes_per_image"].get(part))])
        total = least["total"]
        compiled = _cells(result["compiled"], total.get("launches"), total.get("megabytes_per_image"))
        rows.append([side, "**compiled graphs**", *compiled])
        rows.append([side, "**step**", *_cells(_whole(result), None, None)])
        rows.append([side, "view engine", *_cells(result["view_engine"], None, None)])
    return [*table(["step", "part", *heads], rows, words=2), "", *_origins(results)]


def kernels(results: Results) -> list[str]:
    """Kinds of kernels of the main recipe and of a ViT, the largest traffic first."""
    heads = ["launches", "MB an image", "GFLOP an image"]
    rows: list[list[str]] = []
    for side in ("ResNet-50, sm_90", "ViT-S, sm_90"):
        found = results.get(SIDES[side])
        if found is None:
            rows.append([side, NOT_YET])
            continue
        for own in found["kinds"][:_SHOWN]:
            numbers = (own["megabytes_per_image"], own["gflops_per_image"])
            cells = [f"{own['launches']:,}", *(significant(number) if number else "" for number in numbers)]
            rows.append([side, own["part"], f"`{_short(own['name'])}`", *cells])
    return table(["step", "part", "kernel", *heads], rows, words=3)


def resources(results: Results) -> list[str]:
    """Registers of the kernels that move most in the main recipe."""
    heads = ["launches", "MB an image", "registers", "spilled, bytes", "shared, bytes"]
    if MAIN not in results:
        return table(["part", "kernel", *heads], [[NOT_YET]], words=2)
    rows = [
        [
            own["part"],
            f"`{_short(own['name'])}`",
            f"{own['launches']:,}",
            significant(own["megabytes_per_image"]),
            *(f"{own[name]:,}" for name in ("registers", "spilled", "shared")),
        ]
        for own in results[MAIN]["largest"]
        if "registers" in own
    ]
    return table(["part", "kernel", *heads], rows, words=2)


def _cells(own: Result, launches: int | None, megabytes: float | None) -> list[str]:
    """Cells of one part; blank where there is nothing."""
    counts = (own["launches"], own["triton_launches"], own["library_calls"], launches)
    numbers = (own["megabytes_per_image"], megabytes, own["gflops_per_image"], own["milliseconds"])
    return [
        *(f"{count:,}" if count else "" for count in counts),
        *(significant(number) if number else "" for number in numbers),
    ]


def _whole(result: Result) -> Result:
    """The whole step as a part."""
    parts = result["parts"].values()
    counted = {name: sum(own[name] for own in parts) for name in ("triton_launches", "library_calls")}
    named = {name: result[name] for name in ("launches", "megabytes_per_image", "gflops_per_image")}
    return counted | named | {"milliseconds": result["predicted_milliseconds"]}


def _short(name: str) -> str:
    """A kernel's name without the operations in the middle, which can be a dozen."""
    return name if len(name) <= 60 else f"{name[:45]}...{name[-12:]}"


def _origins(results: Results) -> list[str]:
    return [
        origin(results, name, side, _about(results[name]) if name in results else (), folder=FOLDER)
        for side, name in SIDES.items()
    ]


def _about(result: Result) -> list[str]:
    """What a reader needs to know of a result."""
    steps = f", {result['accumulate']} micro-batches" if result["accumulate"] > 1 else ""
    return [f"`{result['recipe']}`", f"batch {result['batch_size']}{steps}", result["precision"], result["target"]]
