"""Contenders in processes of their own: turns in order, memory of each, and failures that cost the others nothing."""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from benchmarks.measuring.isolated import Turn, Turns
from benchmarks.measuring.process_memory import Memory, PeakMemory, largest, memory_of
from benchmarks.measuring.turns import Budget, rates, ratios, take_turns
from pipelines.runtime import InputError


@contextmanager
def contenders() -> Iterator[Turns]:
    """Two that work, one that fails in its turn, one whose process ends in its third turn."""
    held: list[bytes] = []
    turns = iter(range(3))

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
        if next(turns) == 2:
            os._exit(3)
        return {"images": 8, "seconds": 1.0}

    yield {"large": large, "small": small, "failing": failing, "dying": dying}


@contextmanager
def impossible() -> Iterator[Turns]:
    raise InputError("it needs another machine")
    yield {}


def test_failures_cost_the_others_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = take_turns({"one": partial(contenders), "other": partial(impossible)}, repeats=2)
    assert outcome.missing == {"other": "it needs another machine"}
    assert set(outcome.failed) == {"failing", "dying"}
    assert outcome.failed["failing"] == "ZeroDivisionError: nothing to divide by"
    assert "exit code 3" in outcome.failed["dying"]
    assert {name: len(turns) for name, turns in outcome.turns.items()} == {"large": 2, "small": 2}
    assert "left out other: it needs another machine" in capfd.readouterr().err
    if sys.platform == "linux":
        large, small = (outcome.turns[name][-1].memory for name in ("large", "small"))
        assert large.processes == small.processes == 1
        assert 90 < large.rss - small.rss < 110
        # Wider: other tests' processes come and go, and with them the share of the libraries' pages that counts here.
        assert 30 < large.pss - small.pss < 170


@contextmanager
def slow() -> Iterator[Turns]:
    """Two that take their time."""

    def turn() -> dict[str, float]:
        time.sleep(0.6)
        return {"images": 6, "seconds": 0.6}

    yield {"one": turn, "other": turn}


def test_what_is_done_is_said_and_kept_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    kept: list[dict[str, int]] = []
    take_turns(
        {"slow": partial(slow)},
        repeats=2,
        keep=lambda outcome: kept.append({name: len(turns) for name, turns in outcome.turns.items()}),
    )
    assert kept == [{"one": 1}, {"one": 1, "other": 1}, {"one": 2, "other": 1}, {"one": 2, "other": 2}]
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in said if "of o" in line] == [
        "warm-up of one: 10.0 images/s",
        "warm-up of other: 10.0 images/s",
        "turn 1 of 2 of one: 10.0 images/s",
        "turn 1 of 2 of other: 10.0 images/s",
        "turn 2 of 2 of one: 10.0 images/s",
        "turn 2 of 2 of other: 10.0 images/s",
    ]
    assert said[0] == "building slow ..."
    assert said[1].startswith("built slow after ")


class Told(Budget):
    """Time that is spent after so many questions."""

    def __init__(self, questions: int) -> None:
        super().__init__(5.0)
        self.left = questions

    @property
    def spent(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_when_time_is_spent_who_is_warm_takes_one_turn() -> None:
    # It is asked for the process and for the warm-up of "one", and is spent at that of "other".
    outcome = take_turns({"slow": partial(slow)}, repeats=9, budget=Told(2))
    assert {name: len(turns) for name, turns in outcome.turns.items()} == {"one": 1}
    assert outcome.missing == {"other": "no time was left of the 5 s (--seconds)"}


def test_without_time_nothing_is_built() -> None:
    outcome = take_turns({"slow": partial(slow)}, repeats=1, budget=Budget(0.0))
    assert outcome.missing == {"slow": "no time was left of the 0 s (--seconds)"}
    assert outcome.turns == {}


def test_rates_and_ratios() -> None:
    def turn(seconds: float, rss: float) -> Turn:
        return Turn(report={"images": 10, "seconds": seconds}, memory=Memory(rss=rss, pss=5.0, processes=1))

    turns = {"base": [turn(2.0, 7.0), turn(4.0, 9.0), turn(5.0, 8.0)], "fast": [turn(1.0, 1.0)] * 3}
    assert rates(turns["base"], views=5) == {
        "images_per_second": 2.5,
        "views_per_second": 12.5,
        "spread": {"min": 2.0, "max": 5.0, "n": 3},
        "peak_memory_mib": {"rss": 9.0, "pss": 5.0, "processes": 1},
    }
    assert ratios(turns, "base") == {"fast": {"median": 4.0, "min": 2.0, "max": 5.0, "n": 3}}
    assert ratios(turns, "absent") == {}
    turns["fast"].pop()  # no time for its last turn
    assert ratios(turns, "base") == {"fast": {"median": 3.0, "min": 2.0, "max": 4.0, "n": 2}}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by /proc")
def test_memory_is_sampled_while_it_is_held() -> None:
    before = memory_of(os.getpid())
    with PeakMemory(os.getpid(), every=0.01) as watch:
        block = mmap.mmap(-1, 50 * 2**20)  # not the allocator's, which may have pages to spare
        for start in range(0, len(block), 4096):
            block[start] = 1
        time.sleep(0.2)
        block.close()
    assert 45 < watch.peak.rss - before.rss < 70
    assert largest(before, watch.peak).rss == watch.peak.rss
    assert memory_of(2**30) == Memory(processes=1)  # there is no such process
