"""Cells of contenders, which all benchmarks that take turns have alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.report.markdown import table
from benchmarks.report.origins import NOT_YET, Result, Results, Sides
from benchmarks.report.rounding import significant, with_spread


def stacked(
    results: Results, sides: Sides, heads: Sequence[str], cells: Callable[[Result, str], list[str]]
) -> list[str]:
    """A table with the contenders of each side one below the other, and one row for a side without a result."""
    rows: list[list[str]] = []
    for side, name in sides.items():
        if name in results:
            contenders = entrants(results[name])
            rows += [[side, contender, *cells(results[name], contender)] for contender in contenders]
        else:
            rows.append([side, NOT_YET])
    return table(["on", "contender", *heads], rows, words=2)


def entrants(result: Result) -> list[str]:
    """Who took part, whether it failed or not."""
    return list(dict.fromkeys([*result.get("contenders", {}), *result.get("failed", {})]))


def rate(own: Result | None) -> str:
    return "failed" if own is None else with_spread(own["images_per_second"], own["spread"])


def views_rate(own: Result | None) -> str:
    return "" if own is None else significant(own["views_per_second"])


def ratio(ratio: Result | None) -> str:
    return "" if ratio is None else with_spread(ratio["median"], ratio)


def memory(own: Result | None) -> str:
    """Peak of the processes, shared pages counted once, and of the GPU; blank where the system does not tell."""
    host = 0 if own is None else own["peak_memory_mib"]["pss"]
    parts = [significant(host)] if host else []
    if own is not None and "device_mib" in own:
        parts.append(f"{significant(own['device_mib'])} on the GPU")
    return " + ".join(parts)
