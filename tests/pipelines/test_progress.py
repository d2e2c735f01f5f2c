"""Progress lines and the progress bar, with a stand-in for the clock."""

from __future__ import annotations

import io
import itertools
import time

import pytest
from rich.console import Console

from pipelines.progress import Progress, duration


def set_clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    clock = iter(times)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))


def test_indexing_prints_only_if_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 0.0, 1.0, 2.5, 3.0, 5.0)
    text = io.StringIO()
    progress = Progress(Console(file=text), "indexing photos")
    for found in (10, 2000, 3000, 4000):
        progress.update(found)
    assert text.getvalue() == "indexing photos: 2,000 images so far, 0:02\nindexing photos: 4,000 images so far, 0:05\n"


def test_counted_work_prints_its_rate_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 0.0, 1.0, 6.0, 8.0)
    text = io.StringIO()
    progress = Progress(Console(file=text), "features", total=2000)
    for more in (200, 1000, 800):
        progress.add(more)
    assert (
        text.getvalue() == "features: 1,200 of 2,000, 200 images/s, 0:04 left\nfeatures: 2,000 of 2,000, 250 images/s\n"
    )


def test_resumed_work_counts_its_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 0.0, 10.0, 20.0, 20.0)
    text = io.StringIO()
    with Progress(Console(file=text), "converting", total=200, done=100) as progress:
        progress.add(50, note="3 bad")
        progress.add(50, note="4 bad")
    lines = text.getvalue().splitlines()
    assert lines == [
        "converting: 150 of 200, 5.0 images/s, 3 bad, 0:10 left",
        "converting: 200 of 200, 5.0 images/s, 4 bad",
    ]
    assert (progress.done, progress.done_now, progress.seconds) == (200, 100, 20.0)


def test_context_manager_prints_no_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 0.0, 1.0)
    text = io.StringIO()
    with Progress(Console(file=text), "converting", total=10) as progress:
        progress.add(10)
    assert text.getvalue() == ""


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0, 0.5)
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    text = io.StringIO()
    with Progress(Console(file=text, force_terminal=True, width=120), "converting [a]", total=10) as progress:
        progress.add(10, note="1 bad")
    for words in ("converting [a]", "10/10", "images/s, 1 bad"):
        assert words in text.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3600, -5)] == ["0:00", "1:00", "1:01", "1:00:00", "0:00"]
