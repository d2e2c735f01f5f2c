"""Results of the benchmarks as Markdown tables: each function takes results by name and returns lines.

A result that is missing leaves its cells blank or gives a row that says so, and the table fills itself in once it is
there. Numbers are as the benchmarks gave them, rounded.
"""

from __future__ import annotations

from typing import Any

from benchmarks.report.markdown import table
from benchmarks.report.origins import (
    MADE_BY,
    NOT_YET,
    Results,
    command,
    machine,
    turns,
)
from benchmarks.report.rounding import percent, significant


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
