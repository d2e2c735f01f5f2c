"""Tables of the loader: bench_loader and bench_lock."""

from __future__ import annotations

from benchmarks.bench_loader import BASELINE
from benchmarks.report.contender_cells import memory, rate, ratio, stacked, views_rate
from benchmarks.report.markdown import table
from benchmarks.report.origins import NOT_YET, Result, Results, Sides, origins
from benchmarks.report.rounding import percent, significant, with_spread

SIDES = {
    "CPU": "loader_cpu",
    "CPU, 64 px": "loader_tiny_cpu",
    "GPU": "loader_cuda",
    "GPU, 64 px": "loader_tiny_cuda",
}


def loader(results: Results) -> list[str]:
    """Contenders of bench_loader, with the files in memory."""
    return _loaders(results, SIDES)


def loader_cold(results: Results) -> list[str]:
    """The same with the files dropped from memory before each turn."""
    return _loaders(results, {"CPU": "loader_cold_cpu"})


def _loaders(results: Results, sides: Sides) -> list[str]:
    heads = ["source images/s", "views/s", "memory, MiB", "times the DataLoader"]

    def cells(result: Result, contender: str) -> list[str]:
        own = result["contenders"].get(contender)
        times = "1" if contender == BASELINE and own else ratio(result["times_dataloader"].get(contender))
        return [rate(own), views_rate(own), memory(own), times]

    return [*stacked(results, sides, heads, cells), "", *origins(results, sides, _of_loader)]


def _of_loader(result: Result) -> list[str]:
    shown = [f"{result['images']:,} images of {significant(result['mean_kilobytes'])} KB"]
    shown += [result["disk"]] if result.get("disk") else []
    if result["cold"]:
        cached = max((own.get("cached_share_before_turns", 0) for own in result["contenders"].values()), default=0)
        shown.append(f"at most {percent(cached)} of the files in memory before a turn")
    return shown


def lock(results: Results) -> list[str]:
    """What bench_lock measured of this loader, and of an earlier one."""
    sides = {"CPU": "lock_cpu", "CPU, 64 px": "lock_tiny_cpu"}
    names = {"this": "now", "other": "before"}
    rows: list[list[str]] = []
    for side, name in sides.items():
        if name not in results:
            rows.append([side, NOT_YET])
            continue
        for contender, own in results[name]["contenders"].items():
            shown = with_spread(own["lost_milliseconds"], own["spread"])
            rows.append([side, names[contender], shown, significant(own["images_per_second"])])
    heads = ["lost a batch, ms", "source images/s beside it"]
    return [
        *table(["on", "loader", *heads], rows, words=2),
        "",
        *origins(results, sides, lambda result: [f"batch {result['batch_size']}, views of {result['size']} px"]),
    ]
