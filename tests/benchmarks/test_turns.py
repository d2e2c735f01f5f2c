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

from benchmarks.isolated import Turn, Turns
from benchmarks.process_memory import Memory, PeakMemory, largest, memory_of
from benchmarks.turns import rates, ratios, take_turns
from pipelines.errors import InputError


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
