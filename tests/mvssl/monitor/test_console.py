"""Progress on the console: lines, the live panel, and counted work."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from mvssl.monitor.console import Status, TrainingProgress

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


def test_the_line_shows_the_idle_fraction_of_a_gpu() -> None:
    assert "gpu-idle" not in STATUS.line()
    assert "data-wait 1.2 %  gpu-idle 3.4 %  |" in replace(STATUS, device_idle=0.034).line()
