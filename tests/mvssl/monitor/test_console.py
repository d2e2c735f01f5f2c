"""Progress on the console: lines, the live panel, and counted work."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
from rich.console import Console

from mvssl.monitor.console import Progress, Status, TrainingProgress, duration

STATUS = Status(
    step=30,
    steps=120,
    epoch=2,
    epochs=6,
    losses={"global": 1.25, "local": 0.5},
    learning_rate=0.4,
    tau=0.996,
    images_per_second=1500.0,
    views_per_image=5,
    data_wait=0.0125,
    memory_gib=3.5,
    seconds_left=3725.0,
)
SHOWN = (
    "2/6",
    "30/120",
    "1:02:05",
    "global 1.2500",
    "local 0.5000",
    "1,500 images/s",
    "7,500 views/s",
    "data-wait 1.2 %",
)


def test_plain_line_shows_everything() -> None:
    text = io.StringIO()
    display = TrainingProgress(Console(file=text, width=60), steps=120, done=0)
    assert not display.live
    display.show(STATUS)
    display.close()
    line = text.getvalue()
    assert line.count("\n") == 1
    for words in (*SHOWN, "lr 0.4", "tau 0.99600", "memory 3.50 GiB"):
        assert words in line


def test_live_panel_shows_the_same() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=140, color_system=None)
    display = TrainingProgress(console, steps=120, done=0)
    assert display.live
    display.show(STATUS)
    display.close()
    for words in (*SHOWN, "lr 0.4", "tau 0.99600"):
        assert words in text.getvalue()


def test_indexing_prints_only_if_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.5, 3.0, 5.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    text = io.StringIO()
    progress = Progress(Console(file=text), "indexing photos")
    for found in (10, 2000, 3000, 4000):
        progress.update(found)
    assert text.getvalue() == "indexing photos: 2,000 images so far\nindexing photos: 4,000 images so far\n"


def test_counted_work_prints_its_rate_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 8.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    text = io.StringIO()
    progress = Progress(Console(file=text), "features", total=2000)
    for more in (200, 1000, 800):
        progress.add(more)
    assert (
        text.getvalue() == "features: 1,200 of 2,000, 200 images/s, 0:04 left\nfeatures: 2,000 of 2,000, 250 images/s\n"
    )


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3600, -5)] == ["0:00", "1:00", "1:01", "1:00:00", "0:00"]


def test_the_line_shows_the_idle_fraction_of_a_gpu() -> None:
    assert "gpu-idle" not in STATUS.line()
    assert "data-wait 1.2 %  gpu-idle 3.4 %  |" in replace(STATUS, device_idle=0.034).line()
