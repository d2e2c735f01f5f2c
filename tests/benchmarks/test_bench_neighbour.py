"""bench_neighbour: what it starts, in which environment, and the ratios of its result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_neighbour
from benchmarks.bench_neighbour import SETTINGS, Arguments, busy, measure, measure_run, measure_step
from benchmarks.report.tables import neighbour
from mvssl.cli import SPINS


def test_medians_make_the_ratios_and_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str, bool]] = []
    running: list[int] = []

    class Busy:
        def __init__(self, processes: int) -> None:
            self.processes = processes

        def __enter__(self) -> None:
            running.append(self.processes)

        def __exit__(self, *_: object) -> None:
            running.pop()

    def made_up(what: str, alone: float, beside: float) -> Any:
        def rate(folder: Path, arguments: Arguments, environment: dict[str, str]) -> float:
            assert (folder / "images/class_0/0.jpg").is_file()
            calls.append((what, environment["GOMP_SPINCOUNT"], running[-1] > 0))
            slower = 0.98 if environment["GOMP_SPINCOUNT"] == SPINS else 0.3 if running[-1] else 1.0
            return slower * (beside if running[-1] else alone)

        return rate

    monkeypatch.setattr(bench_neighbour, "busy", Busy)
    monkeypatch.setattr(
        bench_neighbour, "MEASURES", {"whole run": made_up("run", 100, 50), "bare step": made_up("step", 200, 80)}
    )
    result = measure(Arguments(repeats=2), command="x")
    assert len(calls) == len(set(calls)) * 2 == 16, "two measures, two settings, alone and busy, twice, in turns"
    assert calls[:8] == calls[8:]
    assert result["busy_over_alone"] == {"whole run": 0.5, "bare step": 0.4}
    assert result["alone_over_default"] == {"whole run": 0.98, "bare step": 0.98}
    table = "\n".join(neighbour({"neighbour_cpu": result}))
    assert "| whole run, as the commands set it | 98.0 (98.0 to 98.0) | 49.0 (49.0 to 49.0) | 0.50 | 0.98 |" in table
    assert "| bare step, the default of libgomp | 200 (200 to 200) | 24.0 (24.0 to 24.0) | 0.12 | 1.00 |" in table


def test_measurements_run_in_processes_with_their_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []

    def output(command: list[str], environment: dict[str, str], *, codes: tuple[int, ...] = (0,)) -> str:
        seen.append((command, environment))
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/summary.json").write_text('{"images_per_second": 12.5}')
        return "noise\n34.5\n"

    monkeypatch.setattr(bench_neighbour, "_output", output)
    assert measure_step(tmp_path, Arguments(seconds=7), SETTINGS["set"]) == 34.5
    assert measure_run(tmp_path, Arguments(seconds=7), SETTINGS["default"]) == 12.5
    assert [environment["GOMP_SPINCOUNT"] for _, environment in seen] == [SPINS, "300000"]
    assert seen[0][0][-3:] == ["--step", "--seconds", "7"]
    assert seen[1][0][seen[1][0].index("--time") + 1] == "7s"


def test_neighbours_are_busy_and_end() -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    with busy(2):
        assert len(children() - before) == 2
    assert children() <= before
