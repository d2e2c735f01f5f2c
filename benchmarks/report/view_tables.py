"""Tables of what makes views: bench_views, and the bytes of the fused engine's kernels."""

from __future__ import annotations

from benchmarks.contenders.views import CONTENDERS
from benchmarks.measuring import view_bytes
from benchmarks.report.contender_cells import entrants, rate, ratio, stacked, views_rate
from benchmarks.report.markdown import table
from benchmarks.report.origins import Result, Results, origin, origins
from benchmarks.report.rounding import percent, scientific, significant


def views(results: Results) -> list[str]:
    """Contenders of bench_views, on the CPU beside the GPU."""
    sides = {"CPU": "views_cpu", "GPU": "views_cuda_bfloat16"}
    names = {name for side in sides.values() for name in entrants(results.get(side, {}))}
    rows = [
        [name, *(cell for side in sides.values() for cell in _view_rates(results.get(side, {}), name))]
        for name in sorted(names, key=_place)
    ]
    heads = [f"{side}: {head}" for side in sides for head in ("source images/s", "views/s", "times torchvision")]
    return [*table(["contender", *heads], rows), "", *origins(results, sides, _of_views)]


def views_details(results: Results) -> list[str]:
    """All that bench_views says of speed and of differences, in every type."""
    heads = ["source images/s", "views/s", "times torchvision", "host share", "largest difference", "in 1/255"]

    def cells(result: Result, contender: str) -> list[str]:
        own = result["contenders"].get(contender, {})
        difference = own.get("difference_from_torchvision_cpu")
        shown = [percent(own["host_share"])] if own else []
        shown += [scientific(difference["normalised"]), scientific(difference["levels"])] if difference else []
        return [*_view_rates(result, contender), *shown]

    sides = {
        "CPU, float32": "views_cpu",
        "GPU, bfloat16": "views_cuda_bfloat16",
        "GPU, float32": "views_cuda_float32",
    }
    return stacked(results, sides, heads, cells)


def kernels(results: Results) -> list[str]:
    """The table of view_bytes, with the times that tune_fused measured."""
    measured = {}
    if "tune_fused" in results:
        images = results["tune_fused"]["images"]
        kernels = results["tune_fused"]["kernels"].items()
        measured = {name: 1e3 * own["now"]["milliseconds"] / images for name, own in kernels}
    shown = view_bytes.table(view_bytes.Arguments(), measured=measured).splitlines()
    return [*shown, "", origin(results, "tune_fused", "Times", folder="results")]


def _of_views(result: Result) -> list[str]:
    count = result["threads"]
    threads = ["one thread" if count == 1 else f"{count} threads"] if result["device"] == "cpu" else []
    return [result["dtype"], *threads, f"photos of {significant(result['mean_megapixels'])} megapixels"]


def _view_rates(result: Result, contender: str) -> list[str]:
    """Cells of one contender of bench_views; blank where it did not take part."""
    if contender in result.get("failed", {}):
        return ["failed", "", ""]
    own = result.get("contenders", {}).get(contender)
    if own is None:
        return ["", "", ""]
    return [rate(own), views_rate(own), "1" if contender == "torchvision" else ratio(own["times_torchvision"])]


def _place(contender: str) -> int:
    """Where it stands among the contenders that make views; those that are unknown come last."""
    return [*CONTENDERS, contender].index(contender)
