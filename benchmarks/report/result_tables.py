"""Results of the benchmarks as Markdown tables: each function takes results by name and returns lines.

A result that is missing leaves its cells blank or gives a row that says so, and the table fills itself in once it is
there. Numbers are as the benchmarks gave them, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.bench_loader import BASELINE
from benchmarks.contenders.step import PLAIN
from benchmarks.contenders.views import CONTENDERS
from benchmarks.measuring import view_bytes
from benchmarks.report.markdown import table
from benchmarks.report.origins import (
    MADE_BY,
    NOT_YET,
    Result,
    Results,
    Sides,
    command,
    machine,
    origin,
    origins,
    turns,
)
from benchmarks.report.rounding import percent, scientific, significant, with_spread


def headlines(results: Results) -> list[str]:
    """The ratios that matter, CPU beside GPU."""

    def times(name: str, *path: str) -> str:
        """A ratio in a result, by the keys that lead to it."""
        value: Any = results.get(name, {})
        for key in path:
            value = value.get(key) or {}
        return f"{significant(value['median'])} times" if value else NOT_YET

    def wait(name: str) -> str:
        own = results.get(name, {}).get("contenders", {}).get("mvssl") or {}
        return percent(own["data_wait"]) if "data_wait" in own else NOT_YET

    loaders, views, train = "times_dataloader", ("contenders", "times_torchvision"), "times_plain_with_dataloader"
    rows = [
        [
            "the five views of photos, against torchvision",
            times("views_cpu", views[0], "native", views[1]),
            times("views_cuda_bfloat16", views[0], "fused", views[1]),
        ],
        [
            "reading, decoding and views of photos, against a DataLoader with torchvision",
            times("loader_cpu", loaders, "shards + dali"),
            times("loader_cuda", loaders, "shards + dali"),
        ],
        [
            "the same from the second epoch on, with `--cache`",
            times("loader_cpu", loaders, "shards + dali, kept"),
            times("loader_cuda", loaders, "shards + dali, kept"),
        ],
        ["the same of 64-pixel images", times("loader_tiny_cpu", loaders, "folder + dali, kept"), NOT_YET],
        ["training, against a plain step with that DataLoader", times("train_cpu", train), times("train_cuda", train)],
        ["share of the time that training waits for data", wait("train_cpu"), wait("train_cuda")],
    ]
    return table(["what", "2 CPU cores", "GPU"], rows)


def views(results: Results) -> list[str]:
    """Contenders of bench_views, on the CPU beside the GPU."""
    sides = {"CPU": "views_cpu", "GPU": "views_cuda_bfloat16"}
    names = {name for side in sides.values() for name in _entrants(results.get(side, {}))}
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
    return _stacked(results, sides, heads, cells)


def loader(results: Results) -> list[str]:
    """Contenders of bench_loader, with the files in memory."""
    return _loaders(results, {"CPU": "loader_cpu", "CPU, 64 px": "loader_tiny_cpu", "GPU": "loader_cuda"})


def loader_cold(results: Results) -> list[str]:
    """The same with the files dropped from memory before each turn."""
    return _loaders(results, {"CPU": "loader_cold_cpu"})


def _loaders(results: Results, sides: Sides) -> list[str]:
    heads = ["source images/s", "views/s", "memory, MiB", "times the DataLoader"]

    def cells(result: Result, contender: str) -> list[str]:
        own = result["contenders"].get(contender)
        times = "1" if contender == BASELINE and own else _ratio(result["times_dataloader"].get(contender))
        return [_rate(own), _views_rate(own), _memory(own), times]

    return [*_stacked(results, sides, heads, cells), "", *origins(results, sides, _of_loader)]


def train(results: Results) -> list[str]:
    """Contenders of bench_train and the ratios that matter."""
    sides = {"CPU": "train_cpu", "GPU": "train_cuda"}
    heads = ["source images/s", "wait for data", "GPU idle", "of it launching", "memory, MiB"]

    def cells(result: Result, contender: str) -> list[str]:
        own = result["contenders"].get(contender)
        names = ("data_wait", "device_idle", "launching")
        shares = [percent(own[name]) if own and name in own else "" for name in names]
        return [_rate(own), *shares, _memory(own)]

    ratios = {
        "Loaded over synthetic input": "loaded_over_synthetic",
        "the same of the plain step with a DataLoader": "plain_loaded_over_synthetic",
        "mvssl over the plain step with a DataLoader": "times_plain_with_dataloader",
    }
    measured = {side: results[name] for side, name in sides.items() if name in results}
    sentences = [
        f"{what}: "
        + ", ".join(f"{side} {_ratio(result[field]) or 'not measured'}" for side, result in measured.items())
        for what, field in ratios.items()
    ]
    return [
        *_stacked(results, sides, heads, cells),
        "",
        *(["; ".join(sentences) + ".", ""] if measured else []),
        *origins(results, sides, _of_train),
    ]


def step(results: Results) -> list[str]:
    """Contenders of bench_step: each recipe at each batch size."""
    sides = {"CPU": "step_cpu", "GPU": "step_cuda"}
    heads = [
        "source images/s",
        "times the plain step",
        "launches",
        "host, ms",
        "device, ms of a step's",
        "TFLOP/s",
        "of the peak",
        "with the loader",
        "memory, MiB",
    ]
    rows: list[list[str]] = []
    for side, name in sides.items():
        if name not in results:
            rows.append([side, NOT_YET])
            continue
        for measured in results[name]["recipes"]:
            what = f"{measured['recipe']['name']}, batch {measured['batch_size']}"
            rows += [[side, what, contender, *_of_step(measured, contender)] for contender in _entrants(measured)]
    return [*table(["on", "recipe", "contender", *heads], rows, words=3), "", *origins(results, sides, _about_steps)]


def _of_step(measured: Result, contender: str) -> list[str]:
    """Cells of one contender of bench_step."""
    own = measured["contenders"].get(contender)
    if own is None:
        return ["failed"]
    busy, loaded = own["busy_milliseconds"], measured["with_loader"].get(contender)
    return [
        _rate(own),
        "1" if contender == PLAIN else _ratio(measured["times_plain"].get(contender)),
        "" if own["launches"] is None else f"{own['launches']:,.0f}",
        significant(own["host_milliseconds"]),
        "" if busy is None else f"{significant(busy)} of {significant(own['milliseconds'])}",
        significant(own["tflops"]),
        "" if own["share_of_peak"] is None else percent(own["share_of_peak"]),
        "" if loaded is None else percent(loaded["over_alone"]["median"]),
        _memory(own),
    ]


def _about_steps(result: Result) -> list[str]:
    """Steps of a turn, turns, and what the share of the peak is of."""
    said = [f"{result['steps']} steps a turn", f"median of {max(map(turns, result['recipes']), default=0)} turns"]
    for measured in result["recipes"]:
        if (peak := measured["matrix_product"]) is not None:
            kind = peak["dtype"].removeprefix("torch.")
            product = f"a product of matrices of {peak['side']:,} x {peak['side']:,} in {kind}"
            return [*said, f"peak {significant(peak['tflops'])} TFLOP/s: {product}"]
    return said


def start(results: Results) -> list[str]:
    """Kinds of starts of bench_start."""
    sides = {"CPU": "start_cpu", "GPU": "start_cuda"}
    heads = ["training after, s", "imports", "building", "first step", "a later step"]
    phases = ("training_after", "imports", "build", "first_step", "later_step")
    rows: list[list[str]] = []
    for side, name in sides.items():
        if name not in results:
            rows.append([side, NOT_YET])
            continue
        for kind, own in results[name]["starts"].items():
            rows.append([side, kind, *(significant(own[phase]) for phase in phases)])
    return [*table(["on", "start", *heads], rows, words=2), "", *origins(results, sides, _of_train)]


def kernels(results: Results) -> list[str]:
    """The table of view_bytes, with the times that tune_fused measured."""
    measured = {}
    if "tune_fused" in results:
        images = results["tune_fused"]["images"]
        kernels = results["tune_fused"]["kernels"].items()
        measured = {name: 1e3 * own["now"]["milliseconds"] / images for name, own in kernels}
    shown = view_bytes.table(view_bytes.Arguments(), measured=measured).splitlines()
    return [*shown, "", origin(results, "tune_fused", "Times", folder="results")]


def overview(results: Results) -> list[str]:
    """Every result: its file, machine, versions and command."""
    rows = []
    for name in dict.fromkeys([*MADE_BY, *results]):
        if name in results:
            result = results[name]
            file, torch = name if "cells" in result else f"{name}.json", result["environment"]["packages"]["torch"]
            link = f"[`{file}`](results/{file})"
            rows.append([link, machine(result), torch, str(turns(result) or ""), f"`{command(result)}`"])
        else:
            rows.append([f"`{name}.json`", NOT_YET, "", "", f"`{MADE_BY[name]}`"])
    return table(["result", "machine", "torch", "turns", "command"], rows, words=5)


def _of_views(result: Result) -> list[str]:
    count = result["threads"]
    threads = ["one thread" if count == 1 else f"{count} threads"] if result["device"] == "cpu" else []
    return [result["dtype"], *threads, f"photos of {significant(result['mean_megapixels'])} megapixels"]


def _of_loader(result: Result) -> list[str]:
    shown = [f"{result['images']:,} images of {significant(result['mean_kilobytes'])} KB"]
    shown += [result["disk"]] if result.get("disk") else []
    if result["cold"]:
        cached = max((own.get("cached_share_before_turns", 0) for own in result["contenders"].values()), default=0)
        shown.append(f"at most {percent(cached)} of the files in memory before a turn")
    return shown


def _of_train(result: Result) -> list[str]:
    recipe = result["recipe"]
    return [f"`{recipe['name']}`", recipe["backbone"]["name"], f"batch {recipe['batch_size']}"]


def _stacked(
    results: Results, sides: Sides, heads: Sequence[str], cells: Callable[[Result, str], list[str]]
) -> list[str]:
    """A table with the contenders of each side one below the other, and one row for a side without a result."""
    rows: list[list[str]] = []
    for side, name in sides.items():
        if name in results:
            contenders = _entrants(results[name])
            rows += [[side, contender, *cells(results[name], contender)] for contender in contenders]
        else:
            rows.append([side, NOT_YET])
    return table(["on", "contender", *heads], rows, words=2)


def _entrants(result: Result) -> list[str]:
    """Who took part, whether it failed or not."""
    return list(dict.fromkeys([*result.get("contenders", {}), *result.get("failed", {})]))


def _place(contender: str) -> int:
    """Where it stands among the contenders that make views; those that are unknown come last."""
    return [*CONTENDERS, contender].index(contender)


def _view_rates(result: Result, contender: str) -> list[str]:
    """Cells of one contender of bench_views; blank where it did not take part."""
    if contender in result.get("failed", {}):
        return ["failed", "", ""]
    own = result.get("contenders", {}).get(contender)
    if own is None:
        return ["", "", ""]
    return [_rate(own), _views_rate(own), "1" if contender == "torchvision" else _ratio(own["times_torchvision"])]


def _rate(own: Result | None) -> str:
    return "failed" if own is None else with_spread(own["images_per_second"], own["spread"])


def _views_rate(own: Result | None) -> str:
    return "" if own is None else significant(own["views_per_second"])


def _ratio(ratio: Result | None) -> str:
    return "" if ratio is None else with_spread(ratio["median"], ratio)


def _memory(own: Result | None) -> str:
    """Peak of the processes, shared pages counted once, and of the GPU; blank where the system does not tell."""
    host = 0 if own is None else own["peak_memory_mib"]["pss"]
    parts = [significant(host)] if host else []
    if own is not None and "device_mib" in own:
        parts.append(f"{significant(own['device_mib'])} on the GPU")
    return " + ".join(parts)
