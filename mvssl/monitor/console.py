"""Progress of a training run on the console."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from pipelines.names import NAME, cell, say, visible
from pipelines.progress import duration


@dataclass(frozen=True, kw_only=True)
class Status:
    """A log point as the console shows it.

    Attributes:
        step: optimiser steps done, of `steps`.
        epoch: current epoch from 1, of `epochs`.
        losses: loss of each task, averaged since the last log point.
        learning_rate: of the last step.
        tau: EMA momentum of the last step.
        images_per_second: source images/s since the last log point.
        views_per_image: views of each image.
        data_wait: fraction of the time in which the step waited for a batch.
        device_idle: fraction of the time in which the GPU had nothing queued; None if not measured.
        memory_gib: peak memory of the device (CUDA) or of the process (CPU).
        seconds_left: estimated time to the end.
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
    memory_gib: float
    seconds_left: float

    def line(self) -> str:
        """Everything in one line."""
        losses = "  ".join(f"{visible(task, NAME)} {loss:.4f}" for task, loss in self.losses.items())
        return (
            f"epoch {self.epoch}/{self.epochs}  step {self.step}/{self.steps}  ETA {duration(self.seconds_left)}  |  "
            f"loss {losses}  |  {self.images_per_second:,.0f} images/s  "
            f"{self.images_per_second * self.views_per_image:,.0f} views/s  "
            f"data-wait {100 * self.data_wait:.1f} %{self._idle()}  |  "
            f"lr {self.learning_rate:.3g}  tau {self.tau:.5f}  memory {self.memory_gib:.2f} GiB"
        )

    def panel(self) -> Table:
        """Everything but epoch and step in two rows, with colours."""
        wait = 100 * self.data_wait
        table = Table.grid(padding=(0, 3))
        losses = Text("loss")
        for task, loss in self.losses.items():
            losses.append("  ").append_text(cell(task, NAME, style="cyan")).append(f" {loss:.4f}")
        table.add_row(losses, f"lr {self.learning_rate:.3g}   tau {self.tau:.5f}")
        table.add_row(
            f"[bold]{self.images_per_second:,.0f}[/] images/s   "
            f"{self.images_per_second * self.views_per_image:,.0f} views/s",
            f"data-wait [{'green' if wait <= 1 else 'yellow'}]{wait:.1f} %[/]{self._idle()}   "
            f"memory {self.memory_gib:.2f} GiB   ETA {duration(self.seconds_left)}",
        )
        return table

    def _idle(self) -> str:
        return "" if self.device_idle is None else f"  gpu-idle {100 * self.device_idle:.1f} %"


class TrainingProgress:
    """Progress of a training run: a live panel on a terminal and in a notebook, one line per log point elsewhere.

    Attributes:
        live: whether it updates in place.
    """

    def __init__(self, console: Console, *, steps: int, done: int) -> None:
        self._console = console
        self.live = console.is_terminal or console.is_jupyter
        if self.live:
            columns = (TextColumn("[bold]{task.description}"), BarColumn(None), TaskProgressColumn())
            self._bar = Bar(*columns, TimeElapsedColumn(), console=console)
            self._task = self._bar.add_task("training", total=steps, completed=done)
            self._panel = Live(self._bar, console=console, refresh_per_second=4)
            self._panel.start()

    def show(self, status: Status) -> None:
        """Show a log point."""
        if not self.live:
            say(self._console, status.line())
            return
        description = f"epoch {status.epoch}/{status.epochs}  step {status.step}/{status.steps}"
        self._bar.update(self._task, completed=status.step, description=description)
        self._panel.update(Group(self._bar, status.panel()))

    def close(self) -> None:
        """End the live display; its last state stays on the terminal."""
        if self.live:
            self._panel.stop()
