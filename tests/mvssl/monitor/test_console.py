"""Progress on the console: lines, the live panel, and counted work."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from mvssl.monitor.console import Status, TrainingProgress
from pipelines.progress import rate

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


def test_a_narrow_panel_breaks_between_values() -> None:
    """Of 80 columns two stay free for the ^C that the terminal echoes; beside busy processes three rows do."""
    wide = replace(STATUS, losses={"global": 1.2, "local": 1.3, "cutout": 1.4}, cores="others use 1.3 of 2 cores")
    for width, most in ((80, 3), (60, 5), (40, 7)):
        text = io.StringIO()
        Console(file=text, force_terminal=True, width=width, color_system=None).print(wide.panel())
        rows = text.getvalue().splitlines()
        assert len(rows) <= most
        assert all(len(row.rstrip()) <= width - 2 for row in rows)
        for words in ("cutout 1.4000", "lr 0.4", "data-wait 1.2 %", "others use 1.3 of 2 cores", "1:02:05"):
            assert any(words in row for row in rows), (words, rows)


def test_the_line_shows_the_idle_fraction_of_a_gpu() -> None:
    assert "gpu-idle" not in STATUS.line()
    assert "data-wait 1.2 %  gpu-idle 3.4 %  |" in replace(STATUS, device_idle=0.034).line()


def test_a_pipe_has_a_line_after_the_first_step_then_by_time() -> None:
    """Log points restart the time; the clock is the test's."""
    now, text = [100.0], io.StringIO()
    display = TrainingProgress(Console(file=text, width=60), steps=1000, done=0, clock=lambda: now[0])
    shown = []
    for step, seconds in enumerate((100, 109, 110, 139, 140, 169, 170, 175), start=1):
        now[0] = float(seconds)
        if display.due():
            display.show(replace(STATUS, step=step))
            shown.append(seconds)
    assert shown == [100, 110, 140, 170]
    display.show(STATUS)  # a log point, at 175 s
    now[0] = 204.0
    assert not display.due()
    now[0] = 205.0
    assert display.due()
    assert text.getvalue().count("\n") == 5


def test_first_step_has_its_time_and_no_speed() -> None:
    line = replace(STATUS, step=1, first_seconds=83.0, losses={}).line()
    assert line == "epoch 2/6  step 1/120  the first step took 83.0 s, start-up included"
    assert "loss global 1.2500" in replace(STATUS, first_seconds=83.0).line()


def test_the_bar_moves_at_every_step_and_keeps_the_losses() -> None:
    text, now = io.StringIO(), [0.0]
    console = Console(file=text, force_terminal=True, width=140, color_system=None)
    display = TrainingProgress(console, steps=120, done=0, starting="compiling", clock=lambda: now[0])
    display.show(STATUS)
    display.show(replace(STATUS, step=31, losses={}))
    display.move(32)  # no new status
    assert not display.due()
    now[0] = 1.0
    assert display.due()
    display.close()
    first, last = text.getvalue().split("\n")[0], text.getvalue()[-1000:]
    assert "step 0/120  compiling" in first
    assert "step 32/120" in last
    assert "global 1.2500" in last


def test_slow_rates_are_not_shown_as_zero() -> None:
    assert [rate(x) for x in (0.0, 0.034, 0.5, 1.0, 7.25, 99.9, 100.0, 1234.5)] == [
        "0.0", "0.034", "0.5", "1.0", "7.2", "99.9", "100", "1,234",
    ]  # fmt: skip
    assert "3.4 images/s  17.0 views/s" in replace(STATUS, images_per_second=3.4).line()
