"""The tables of views, loaders, formats and remote data: each function takes all results by name."""

from __future__ import annotations

from itertools import product
from typing import Any

from benchmarks.bench_loader import BASELINE
from benchmarks.compiled import view_kernels as kernels
from benchmarks.harness.results import Result
from benchmarks.implementations.views import IMPLEMENTATIONS
from benchmarks.report.cells import implementations, memory_cell, rate_cell, ratio_cell, stacked, views_rate_cell
from benchmarks.report.markdown import percent, scientific, significant, table, with_spread
from benchmarks.report.origins import NOT_YET, Results, Sides, origin, origins

LOADERS = tuple(
    f"{storage} + {decoder}"
    for storage, decoder in product(("shards", "folder", "beton"), ("dali", "auto", "pillow", "ffcv"))
)
"""Our loaders in bench_loader; the first one that a result has is shown in the headlines."""


# Views


def views(results: Results) -> list[str]:
    """Implementations of bench_views, on the CPU next to the GPU."""
    sides = {"CPU": "views_cpu", "GPU": "views_cuda_bfloat16"}
    order = {name: number for number, name in enumerate(IMPLEMENTATIONS)}
    names = {name for side in sides.values() for name in implementations(results.get(side, {}))}
    rows = [
        [name, *(cell for side in sides.values() for cell in _view_rates(results.get(side, {}), name))]
        for name in sorted(names, key=lambda name: order.get(name, len(order)))
    ]
    heads = [f"{side}: {head}" for side in sides for head in ("source images/s", "views/s", "times torchvision")]
    return [*table(["implementation", *heads], rows), "", *origins(results, sides, _views_settings)]


def views_details(results: Results) -> list[str]:
    """All numbers of bench_views on speed and differences, in every type."""

    def rows_of(result: Result) -> list[list[str]]:
        rows = []
        for name in implementations(result):
            own = result["contenders"].get(name, {})
            difference = own.get("difference_from_torchvision_cpu")
            cells = [percent(own["host_share"])] if own else []
            cells += [scientific(difference["normalised"]), scientific(difference["levels"])] if difference else []
            rows.append([name, *_view_rates(result, name), *cells])
        return rows

    sides = {"CPU, float32": "views_cpu", "GPU, bfloat16": "views_cuda_bfloat16", "GPU, float32": "views_cuda_float32"}
    heads = ["source images/s", "views/s", "times torchvision", "host share", "largest difference", "in 1/255"]
    return stacked(results, sides, ["implementation", *heads], rows_of)


def view_kernels(results: Results) -> list[str]:
    """Bytes of the fused engine's kernels, with the times of `bench_micro fused`."""
    measured = {}
    if "tune_fused" in results:
        images = results["tune_fused"]["images"]
        own = results["tune_fused"]["kernels"].items()
        measured = {name: 1e3 * kernel["now"]["milliseconds"] / images for name, kernel in own}
    return [*kernels.table(kernels.Arguments(), measured=measured), "", origin(results, "tune_fused", "Times")]


def _views_settings(result: Result) -> list[str]:
    count = result["threads"]
    threads = ["one thread" if count == 1 else f"{count} threads"] if result["device"] == "cpu" else []
    return [result["dtype"], *threads, f"photos of {significant(result['mean_megapixels'])} megapixels"]


def _view_rates(result: Result, name: str) -> list[str]:
    """Cells of one implementation of bench_views; blank if it did not take part."""
    if name in result.get("failed", {}):
        return ["failed", "", ""]
    own = result.get("contenders", {}).get(name)
    if own is None:
        return ["", "", ""]
    return [
        rate_cell(own),
        views_rate_cell(own),
        "1" if name == "torchvision" else ratio_cell(own["times_torchvision"]),
    ]


# Loading


def loader(results: Results) -> list[str]:
    """Implementations of bench_loader, with the files in memory."""
    sides = {
        "CPU": "loader_cpu",
        "CPU, 64 px": "loader_tiny_cpu",
        "GPU": "loader_cuda",
        "GPU, 64 px": "loader_tiny_cuda",
    }
    return _loaders(results, sides)


def loader_cold(results: Results) -> list[str]:
    """The same with the files dropped from the page cache before each trial."""
    return _loaders(results, {"CPU": "loader_cold_cpu"})


def peers(results: Results) -> list[str]:
    """Loaders of other libraries in bench_loader, for the same five views, by CPU time."""
    return _peers(results, details=False, link="benchmarks/results")


def peers_details(results: Results) -> list[str]:
    """The same with rates, versions and what each library's views are."""
    return _peers(results, details=True, link="results")


def _peers(results: Results, *, details: bool, link: str) -> list[str]:
    name = "peers_cpu"
    result = results.get(name, {})
    measured: dict[str, Any] = result.get("contenders", {})
    ours = next((own for own in LOADERS if own in measured), None)
    names = {ours: "mvssl", BASELINE: "torchvision, as the reference implementation"}
    rows = []
    for own, row in measured.items():
        milliseconds = row["cpu_milliseconds"]
        cells = [names.get(own, own), row.get("version", "")] if details else [names.get(own, own)]
        times = "1" if own == ours else ratio_cell(row["times_cpu"])
        cells += [with_spread(milliseconds["median"], milliseconds), times]
        said = "" if own in (ours, BASELINE) else row.get("what", "")
        rows.append([*cells, rate_cell(row), said or "the same views"] if details else cells)
    for own, reason in (result.get("left_out", {}) | result.get("failed", {})).items():
        rows.append([own, *([""] if details else []), f"not measured: {reason.partition(':')[0]}"])
    heads = ["loader", *(["version"] if details else []), "CPU time per image, ms", "times mvssl's"]
    heads += ["source images/s", "its views"] if details else []
    about = origins(results, {"CPU": name}, _loader_settings, link=link)
    return [*table(heads, rows or [[NOT_YET]], words=2 if details else 1), "", *about]


def _loaders(results: Results, sides: Sides) -> list[str]:
    def rows_of(result: Result) -> list[list[str]]:
        rows = []
        for name in implementations(result):
            own = result["contenders"].get(name)
            times = "1" if name == BASELINE and own else ratio_cell(result["times_dataloader"].get(name))
            rows.append([name, rate_cell(own), views_rate_cell(own), memory_cell(own), times])
        return rows

    heads = ["implementation", "source images/s", "views/s", "memory, MiB", "times the DataLoader"]
    return [*stacked(results, sides, heads, rows_of), "", *origins(results, sides, _loader_settings)]


def _loader_settings(result: Result) -> list[str]:
    shown = [f"{result['images']:,} images of {significant(result['mean_kilobytes'])} KB"]
    shown += [result["disk"]] if result.get("disk") else []
    if result["cold"]:
        cached = max((own.get("cached_share_before_turns", 0) for own in result["contenders"].values()), default=0)
        shown.append(f"at most {percent(cached)} of the files in memory before a trial")
    return shown


def gil(results: Results) -> list[str]:
    """Numbers of `bench_micro gil` for this loader, and for an earlier one."""
    sides = {"CPU": "lock_cpu", "CPU, 64 px": "lock_tiny_cpu"}
    names = {"this": "now", "other": "before"}

    def rows_of(result: Result) -> list[list[str]]:
        return [
            [names[name], with_spread(own["lost_milliseconds"], own["spread"]), significant(own["images_per_second"])]
            for name, own in result["contenders"].items()
        ]

    lines = stacked(results, sides, ["loader", "lost a batch, ms", "source images/s meanwhile"], rows_of)
    settings = origins(results, sides, lambda result: [f"batch {result['batch_size']}, views of {result['size']} px"])
    return [*lines, "", *settings]


# Forms and remote data


def formats(results: Results) -> list[str]:
    """Conversion of the forms of bench_formats."""
    name = "formats_cpu"
    rows = [
        [
            form,
            with_spread(
                own["images_per_second"], {"min": own["least"], "max": own["most"], "n": results[name]["repeats"]}
            ),
            significant(own["times_folder"]),
            significant(own["cpu_ms"]),
            f"{own['peak_mib']:.0f}",
        ]
        for form, own in results.get(name, {"forms": {}})["forms"].items()
    ]
    heads = ["form", "images/s", "times the folder", "CPU-ms an image", "peak memory, MiB"]
    return [*table(heads, rows), "", *origins(results, {"CPU": name}, _formats_settings)]


def _formats_settings(result: Result) -> list[str]:
    return [f"{result['images']:,} images of {result['side']} pixels", f"{result['workers']} threads"]


def remote(results: Results) -> list[str]:
    """Reading from a server of bench_remote."""
    name = "remote_cpu"
    kinds = ("first epoch", "second epoch", "no cache", "no cache, order-chunk")
    rows = [
        [f"{latency} ms", *(significant(rates[kind]) for kind in ("local", *kinds))]
        for latency, rates in results.get(name, {"latencies": {}})["latencies"].items()
    ]
    heads = [
        "latency of a request",
        "local disk",
        "first epoch",
        "second epoch",
        "no cache",
        "no cache, `--order-chunk 16`",
    ]
    return [*table(heads, rows), "", *origins(results, {"CPU": name}, _remote_settings)]


def _remote_settings(result: Result) -> list[str]:
    size, connections = result["bytes_per_image"] / 1000, result["connections"]
    return [
        f"{result['images']:,} images of {size:.0f} kB",
        f"batch {result['batch_size']}",
        f"{connections} connections",
    ]
