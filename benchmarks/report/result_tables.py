"""Results of the benchmarks as Markdown tables: each function takes results by name and returns lines.

A result that is missing leaves its cells blank or gives a row that says so, and the table fills itself in once it is
there. Numbers are as the benchmarks gave them, rounded.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from benchmarks.contenders.step import OURS
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

LOADERS = tuple(
    f"{storage} + {decoder}"
    for storage, decoder in product(("shards", "folder", "beton"), ("dali", "auto", "pillow", "ffcv"))
)
"""Our contenders of bench_loader; the first one that a result has is shown."""


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

    def loading(name: str, usual: str, *, suffix: str = "") -> str:
        """How many times the DataLoader's rate ours has; with its name if it is not the usual one."""
        ratios = results.get(name, {}).get("times_dataloader", {})
        found = next((loader for loader in (usual, *LOADERS) if loader + suffix in ratios), usual)
        said = times(name, "times_dataloader", found + suffix)
        return said if found == usual else f"{said} ({found})"

    def step(name: str) -> str:
        """How many times the plain step's rate ours has in the first recipe: captured, else compiled."""
        recipes = results.get(name, {}).get("recipes", [])
        ratios: dict[str, Any] = recipes[0]["times_plain"] if recipes else {}
        found = next((way for way in OURS if way in ratios), None)
        return NOT_YET if found is None else f"{significant(ratios[found]['median'])} times ({found})"

    views, train = ("contenders", "times_torchvision"), "times_plain_with_dataloader"
    shards, folder, kept = "shards + dali", "folder + dali", ", kept"
    rows = [
        ["the step alone, on noise, against a plain eager step", step("step_cpu"), step("step_cuda")],
        [
            "the five views of photos, against torchvision",
            times("views_cpu", views[0], "native", views[1]),
            times("views_cuda_bfloat16", views[0], "fused", views[1]),
        ],
        [
            "reading, decoding and views of photos, against a DataLoader with torchvision",
            loading("loader_cpu", shards),
            loading("loader_cuda", shards),
        ],
        [
            "the same from the second epoch on, with `--cache`",
            loading("loader_cpu", shards, suffix=kept),
            loading("loader_cuda", shards, suffix=kept),
        ],
        [
            "the same of 64-pixel images",
            loading("loader_tiny_cpu", folder, suffix=kept),
            loading("loader_tiny_cuda", folder, suffix=kept),
        ],
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
