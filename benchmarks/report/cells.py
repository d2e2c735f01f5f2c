"""Cells that the tables of all interleaved benchmarks have alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.harness.results import Result
from benchmarks.report.markdown import significant, table, with_spread
from benchmarks.report.origins import NOT_YET, Results, Sides


def implementations(result: Result) -> list[str]:
    """All that took part, whether they failed or not."""
    return list(dict.fromkeys([*result.get("contenders", {}), *result.get("failed", {})]))


def stacked(
    results: Results,
    sides: Sides,
    heads: Sequence[str],
    rows_of: Callable[[Result], list[list[str]]],
    *,
    words: int = 2,
    label: str = "on",
) -> list[str]:
    """A table with the rows of each side one below the other, and one row for a side without a result."""
    rows: list[list[str]] = []
    for side, name in sides.items():
        rows += [[side, *row] for row in rows_of(results[name])] if name in results else [[side, NOT_YET]]
    return table([label, *heads], rows, words=words)


def rate_cell(own: Result | None) -> str:
    return "failed" if own is None else with_spread(own["images_per_second"], own["spread"])


def views_rate_cell(own: Result | None) -> str:
    return "" if own is None else significant(own["views_per_second"])


def ratio_cell(ratio: Result | None) -> str:
    return "" if ratio is None else with_spread(ratio["median"], ratio)


def memory_cell(own: Result | None) -> str:
    """Peak of the processes, shared pages counted once, and of the GPU; blank if the system does not report it."""
    host = 0 if own is None else own["peak_memory_mib"]["pss"]
    parts = [significant(host)] if host else []
    if own is not None and "device_mib" in own:
        parts.append(f"{significant(own['device_mib'])} on the GPU")
    return " + ".join(parts)


def count(value: float | None) -> str:
    """A whole number; blank for none and for zero."""
    return f"{value:,.0f}" if value else ""
