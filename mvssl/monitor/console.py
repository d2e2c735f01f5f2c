"""Progress of a training run on the console."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from pipelines.names import NAME, cell, say, visible
from pipelines.progress import duration, rate

_REDRAWN = 0.2  # seconds between two states of the live panel
_FIRST_PAUSE = 10.0  # seconds without a line after the first one
_PAUSE = 30.0  # and after later ones


@dataclass(frozen=True, kw_only=True)
class Status:
    """A step as the console shows it, at a log point or between two.

    Attributes:
        step: optimiser steps done, of `steps`.
        epoch: current epoch from 1, of `epochs`.
        losses: loss of each task, at a log point averaged since the last one; empty where it is not known yet.
        learning_rate: of the last step.
        tau: EMA momentum of the last step.
        images_per_second: source images/s since the last log point.
        views_per_image: views of each image.
        data_wait: fraction of the time in which the step waited for a batch.
        device_idle: fraction of the time in which the GPU had nothing queued; None if not measured.
        cores: what keeps the run from its CPU cores, such as "others use 1.0 of 2 cores"; "" if nothing does.
        memory_gib: peak memory of the device (CUDA) or of the process (CPU).
        seconds_left: estimated time to the end.
        first_seconds: time of the first step of this run, with the wait for its batch; None for other steps.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    losses: dict[str, float]
    learning_rate: float
    tau: float
    images_per_second: float
    views_per_image: int
    data_wait: float
    device_idle: float | None = None
    cores: str = ""
    memory_gib: float
    seconds_left: float
    first_seconds: float | None = None

    def line(self) -> str:
        """Everything in one line; of the first step no speed, which would be that of starting."""
        losses = "  ".join(f"{visible(task, NAME)} {loss:.4f}" for task, loss in self.losses.items())
        losses = f"  |  loss {losses}" if losses else ""
        if self.first_seconds is not None:
            return f"epoch {self.epoch}/{self.epochs}  step {self.step}/{self.steps}  {self._first()}{losses}"
        return (
            f"epoch {self.epoch}/{self.epochs}  step {self.step}/{self.steps}  ETA {duration(self.seconds_left)}"
            f"{losses}  |  {rate(self.images_per_second)} images/s  "
            f"{rate(self.images_per_second * self.views_per_image)} views/s  "
            f"data-wait {100 * self.data_wait:.1f} %{self._idle()}  |  "
            f"lr {self.learning_rate:.3g}  tau {self.tau:.5f}  memory {self.memory_gib:.2f} GiB"
        )

    def panel(self) -> Group:
        """Everything but the step in three rows, with colours; rows break between values, never within one."""
        wait, losses = 100 * self.data_wait, [Text("loss")] if self.losses else []
        for task, loss in self.losses.items():
            losses.append(Text.assemble(cell(task, NAME, style="cyan"), f" {loss:.4f}"))
        epoch = Text(f"epoch {self.epoch}/{self.epochs}")
        if self.first_seconds is not None:
            return Group(_Row([epoch, Text(self._first())]), _Row(losses))
        speed = [
            Text.assemble((rate(self.images_per_second), "bold"), " images/s"),
            Text(f"{rate(self.images_per_second * self.views_per_image)} views/s"),
            Text.assemble("data-wait ", (f"{wait:.1f} %", "green" if wait <= 1 else "yellow")),
            *map(Text, filter(None, (self._gpu_idle(), self.cores))),
        ]
        rates = [Text(f"lr {self.learning_rate:.3g}"), Text(f"tau {self.tau:.5f}")]
        left = [Text(f"ETA {duration(self.seconds_left)}"), Text(f"memory {self.memory_gib:.2f} GiB")]
        return Group(_Row([epoch, *left]), _Row([*losses, *rates]), _Row(speed))

    def _first(self) -> str:
        return f"the first step took {self.first_seconds or 0.0:.1f} s, start-up included"

    def _gpu_idle(self) -> str:
        return "" if self.device_idle is None else f"gpu-idle {100 * self.device_idle:.1f} %"

    def _idle(self) -> str:
        return "".join(f"  {words}" for words in (self._gpu_idle(), self.cores) if words)


@dataclass(frozen=True)
class _Row:
    """Values side by side, on more lines where the terminal is too narrow."""

    values: list[Text]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - 2  # an echoed ^C must not wrap the line, which would leave the panel's copy behind
        line = Text()
        for value in self.values:
            if line and line.cell_len + 2 + value.cell_len > width:
                yield line
                line = Text()
            line.append("  " if line else "").append_text(value)
        if line:
            yield line


class TrainingProgress:
    """Progress of a training run: a live panel on a terminal and in a notebook with ipywidgets, lines elsewhere.

    The bar moves at every step. A line is printed at every log point, and between two after the first step and by time.

    Attributes:
        live: whether it updates in place.
    """

    def __init__(
        self,
        console: Console,
        *,
        steps: int,
        done: int,
        starting: str = "starting",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`done` of `steps` were done before; `starting` is shown until the first step of this run is done."""
        self._console = console
        self._clock = clock
        self._steps = steps
        self._shown: float | None = None
        self._pause = _FIRST_PAUSE
        self._losses: dict[str, float] = {}  # the last known
        widgets = importlib.util.find_spec("ipywidgets") is not None  # without it rich warns at every state
        self.live = widgets if console.is_jupyter else console.is_terminal
        if self.live:
            columns = (TextColumn("[bold]{task.description}"), BarColumn(None), TaskProgressColumn())
            self._bar = Bar(*columns, TimeElapsedColumn(), console=console)
            self._task = self._bar.add_task(f"step {done}/{steps}  {starting}", total=steps, completed=done)
            self._panel = Live(self._bar, console=console, refresh_per_second=4)
            self._panel.start(refresh=True)

    def move(self, step: int) -> None:
        """Move the bar, if there is one, to this step."""
        if self.live:
            self._bar.update(self._task, completed=step, description=f"step {step}/{self._steps}")

    def due(self) -> bool:
        """Whether a step between two log points is to be shown: the first one, and later ones by time."""
        return self._shown is None or self._clock() - self._shown >= (_REDRAWN if self.live else self._pause)

    def show(self, status: Status) -> None:
        """Show a step. The panel keeps the last losses where new ones are not known."""
        self._pause = _FIRST_PAUSE if self._shown is None else _PAUSE
        self._shown = self._clock()
        if not self.live:
            say(self._console, status.line())
            return
        self._losses = status.losses or self._losses
        self.move(status.step)
        self._panel.update(Group(self._bar, replace(status, losses=self._losses).panel()))

    def close(self) -> None:
        """End the live display; its last state stays on the terminal."""
        if self.live:
            self._panel.stop()
