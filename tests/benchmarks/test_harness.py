"""Trials are interleaved, memory is measured per process, failures cost the others nothing, results are whole files."""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from benchmarks.harness.command import command_of
from benchmarks.harness.page_cache import cached_fraction, drop, files_of
from benchmarks.harness.processes import Memory, PeakMemory, Trial, Trials, memory_of
from benchmarks.harness.results import read_results, write_result
from benchmarks.harness.trials import Budget, interleaved_seconds, peak_memory, rates, ratios, run_trials
from pipelines.runtime import InputError
from pipelines.storage import open_source


@contextmanager
def implementations() -> Iterator[Trials]:
    """Two that work, one that fails in its trial, one whose process ends in its third trial."""
    held: list[bytes] = []
    trials = iter(range(3))

    def large() -> dict[str, float]:
        held.append(b"x" * (100 * 2**20))
        time.sleep(0.5)
        held.clear()
        return {"images": 8, "seconds": 2.0}

    def small() -> dict[str, float]:
        time.sleep(0.5)
        return {"images": 8, "seconds": 4.0}

    def failing() -> dict[str, float]:
        raise ZeroDivisionError("nothing to divide by")

    def dying() -> dict[str, float]:
        if next(trials) == 2:
            os._exit(3)
        return {"images": 8, "seconds": 1.0}

    yield {"large": large, "small": small, "failing": failing, "dying": dying}


@contextmanager
def impossible() -> Iterator[Trials]:
    raise InputError("it needs another machine")
    yield {}


def test_failures_cost_the_others_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = run_trials({"one": partial(implementations), "other": partial(impossible)}, repeats=2)
    assert outcome.left_out == {"other": "it needs another machine"}
    assert set(outcome.failed) == {"failing", "dying"}
    assert outcome.failed["failing"] == "ZeroDivisionError: nothing to divide by"
    assert "exit code 3" in outcome.failed["dying"]
    assert {name: len(trials) for name, trials in outcome.trials.items()} == {"large": 2, "small": 2}
    assert "left out other: it needs another machine" in capfd.readouterr().err
    if sys.platform == "linux":
        large, small = (outcome.trials[name][-1].memory for name in ("large", "small"))
        assert large.processes == small.processes == 1
        assert 90 < large.rss - small.rss < 110
        # Wider, as other tests' processes come and go, and with them the fraction of shared pages that counts here.
        assert 30 < large.pss - small.pss < 170


@contextmanager
def slow() -> Iterator[Trials]:
    """Two that take their time."""

    def trial() -> dict[str, float]:
        time.sleep(0.6)
        return {"images": 6, "seconds": 0.6}

    yield {"one": trial, "other": trial}


def test_every_trial_is_reported_and_saved_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    kept: list[dict[str, int]] = []
    run_trials(
        {"slow": partial(slow)},
        repeats=2,
        save=lambda outcome: kept.append({name: len(trials) for name, trials in outcome.trials.items()}),
    )
    assert kept == [{"one": 1}, {"one": 1, "other": 1}, {"one": 2, "other": 1}, {"one": 2, "other": 2}]
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in said if "of o" in line] == [
        "warm-up of one: 10.0 images/s",
        "warm-up of other: 10.0 images/s",
        "trial 1 of 2 of one: 10.0 images/s",
        "trial 1 of 2 of other: 10.0 images/s",
        "trial 2 of 2 of one: 10.0 images/s",
        "trial 2 of 2 of other: 10.0 images/s",
    ]
    assert said[0] == "building slow ..."
    assert said[1].startswith("built slow after ")


class CountingBudget(Budget):
    """Is spent after so many questions."""

    def __init__(self, questions: int) -> None:
        super().__init__(5.0)
        self.left = questions

    @property
    def spent(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_when_time_is_spent_the_warm_ones_still_run_one_trial() -> None:
    # Asked for the process and for the warm-up of "one", spent at that of "other".
    outcome = run_trials({"slow": partial(slow)}, repeats=9, budget=CountingBudget(2))
    assert {name: len(trials) for name, trials in outcome.trials.items()} == {"one": 1}
    assert outcome.left_out == {"other": "no time was left of the 5 s (--seconds)"}


def test_without_time_nothing_is_built() -> None:
    outcome = run_trials({"slow": partial(slow)}, repeats=1, budget=Budget(0.0))
    assert outcome.left_out == {"slow": "no time was left of the 0 s (--seconds)"}
    assert outcome.trials == {}


def test_rates_and_ratios() -> None:
    def trial(seconds: float, rss: float) -> Trial:
        return Trial(report={"images": 10, "seconds": seconds}, memory=Memory(rss=rss, pss=5.0, processes=1))

    trials = {"base": [trial(2.0, 7.0), trial(4.0, 9.0), trial(5.0, 8.0)], "fast": [trial(1.0, 1.0)] * 3}
    assert rates(trials["base"], views=5) | peak_memory(trials["base"]) == {
        "images_per_second": 2.5,
        "views_per_second": 12.5,
        "spread": {"min": 2.0, "max": 5.0, "n": 3},
        "peak_memory_mib": {"rss": 9.0, "pss": 5.0, "processes": 1},
    }
    assert ratios(trials, "base") == {"fast": {"median": 4.0, "min": 2.0, "max": 5.0, "n": 3}}
    assert ratios(trials, "absent") == {}
    trials["fast"].pop()  # no time for its last trial
    assert ratios(trials, "base") == {"fast": {"median": 3.0, "min": 2.0, "max": 4.0, "n": 2}}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_sampled_while_it_is_held() -> None:
    before = memory_of(os.getpid())
    with PeakMemory(os.getpid(), every=0.01) as watch:
        block = mmap.mmap(-1, 50 * 2**20)  # not the allocator's, which may have pages to spare
        for start in range(0, len(block), 4096):
            block[start] = 1
        time.sleep(0.2)
        block.close()
    assert 45 < watch.peak.rss - before.rss < 70
    assert (before | watch.peak).rss == watch.peak.rss
    assert memory_of(2**30) == Memory(processes=1)  # there is no such process


def test_calls_are_interleaved_and_the_warm_up_is_not_timed() -> None:
    calls: list[str] = []
    works = {name: partial(calls.append, name) for name in ("a", "b")}
    seconds = interleaved_seconds(works, repeats=3, warm_up=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_a_command_is_recorded_as_it_can_be_typed() -> None:
    words = ["/data/x y", "--contenders", "plain step", "--out=z.json", "--steps", "3", "--out", "/tmp/z.json"]
    assert command_of("python -m b", words) == "python -m b 'x y' --contenders 'plain step' --steps 3"
    assert (
        command_of("python -m b", ["../photos", "--recipe", "/home/x/y.toml"]) == "python -m b photos --recipe y.toml"
    )
    assert command_of("python -m b", ["--disk", "150 MB/s"]) == "python -m b --disk '150 MB/s'"
    assert command_of("python -m b", []) == "python -m b"


def test_a_result_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    write_result(None, {"a": 1})
    write_result(path, {"a": 1})
    with pytest.raises(TypeError):
        write_result(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert read_results(path) == [{"a": 1}]


def test_results_of_one_experiment_share_a_file(tmp_path: Path) -> None:
    """A repeated measurement replaces its line; the others stay as they are."""
    path = tmp_path / "all.jsonl"
    first, second = ({"value": n, "environment": {"command": f"measure {n}"}} for n in (1, 2))
    cell = {"value": 3, "cell": {"seed": 1}, "environment": {"command": "measure 1"}}
    for result in (first, second, cell):
        write_result(path, result)
    write_result(path, first | {"value": 4})
    assert read_results(path) == [first | {"value": 4}, second, cell]
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="does not hold a JSON object"):
        read_results(path)


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache can be read and dropped on Linux")
def test_dropped_files_leave_the_page_cache(folder: Path) -> None:
    files = files_of(open_source(folder))
    assert len(files) == 12
    for file in files:
        file.read_bytes()
    assert cached_fraction(files) == 1.0
    drop(files)
    assert cached_fraction(files) in (0.0, 1.0)  # 1 on a file system in memory
