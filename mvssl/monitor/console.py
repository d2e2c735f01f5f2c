"""The progress display: a live panel on a terminal, plain lines elsewhere.

Signs of life of work whose end is known: how many of how many, how fast, how long still.

Signs of life while a large folder is indexed for the first time.

Where log records of a run go: the console for people, train.log for later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Status:
    """What one log point shows.

    Attributes:
        step: optimiser steps done, of `steps`.
        epoch: epochs done or begun, of `epochs`.
        losses: loss of each task, averaged since the last log point.
        learning_rate: of the last step.
        target_decay: of the last step.
        images_per_second: source images per second since the last log point.
        views_per_image: views cut from each image.
        wait_fraction: share of the time the step waited for a batch.
        idle_fraction: share of the time the GPU had nothing queued, in a step or between two; None on the CPU.
        memory_gib: peak memory of the device (CUDA) or of the process (CPU).
        seconds_left: estimated time to the end.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    losses: dict[str, float]
    learning_rate: float
    target_decay: float
    images_per_second: float
    views_per_image: int
    wait_fraction: float
    idle_fraction: float | None = None
    memory_gib: float
    seconds_left: float

    def line(self) -> str:
        """Everything in one line."""
        losses = "  ".join(f"{task} {loss:.4f}" for task, loss in self.losses.items())
        return (
            f"epoch {self.epoch}/{self.epochs}  step {self.step}/{self.steps}  ETA {duration(self.seconds_left)}  |  "
            f"loss {losses}  |  {self.images_per_second:,.0f} images/s  "
            f"{self.images_per_second * self.views_per_image:,.0f} views/s  "
            f"data-wait {100 * self.wait_fraction:.1f} %{self.idle()}  |  "
            f"lr {self.learning_rate:.3g}  decay {self.target_decay:.5f}  memory {self.memory_gib:.2f} GiB"
        )

    def idle(self) -> str:
        """The GPU's idle share behind a gap, where there is one."""
        return "" if self.idle_fraction is None else f"  gpu-idle {100 * self.idle_fraction:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display(Protocol):
    """Shows a run's progress."""

    def show(self, status: Status) -> None:
        """Show a log point."""

    def close(self) -> None:
        """End the display."""


class LiveDisplay:
    """A bar and a table that are drawn anew in place, for a terminal."""

    def __init__(self, console: Console, *, steps: int, done: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._bar = self._progress.add_task("training", total=steps, completed=done)
        self._live = Live(self._progress, console=console, refresh_per_second=4)
        self._live.start()

    def show(self, status: Status) -> None:
        """Draw the log point."""
        description = f"epoch {status.epoch}/{status.epochs}  step {status.step}/{status.steps}"
        self._progress.update(self._bar, completed=status.step, description=description)
        table = Table.grid(padding=(0, 3))
        table.add_row(
            "loss  " + "  ".join(f"[cyan]{task}[/] {loss:.4f}" for task, loss in status.losses.items()),
            f"lr {status.learning_rate:.3g}   target decay {status.target_decay:.5f}",
        )
        wait = 100 * status.wait_fraction
        table.add_row(
            f"[bold]{status.images_per_second:,.0f}[/] images/s   "
            f"{status.images_per_second * status.views_per_image:,.0f} views/s",
            f"data-wait [{'green' if wait <= 1 else 'yellow'}]{wait:.1f} %[/]{status.idle()}   "
            f"memory {status.memory_gib:.2f} GiB   ETA {duration(status.seconds_left)}",
        )
        self._live.update(Group(self._progress, table))

    def close(self) -> None:
        """Leave the last picture on the terminal."""
        self._live.stop()


class PlainDisplay:
    """One line a log point, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def show(self, status: Status) -> None:
        """Print the log point."""
        self._console.print(status.line(), soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Nothing to end."""


def make_display(console: Console, *, steps: int, done: int) -> Display:
    """The display that suits the console: drawn in place on a terminal and in a notebook, lines elsewhere."""
    drawn = console.is_terminal or console.is_jupyter
    return LiveDisplay(console, steps=steps, done=done) if drawn else PlainDisplay(console)


def counting_progress(
    console: Console, what: str, *, total: int, done: int = 0, every: float = 5.0
) -> Callable[[int], None]:
    """A callback that is told of more done, and prints a line at most once in `every` seconds and at the end.

    Args:
        console: where to print.
        what: the work, such as "features of data/train".
        total: of the images.
        done: before it began.
    """
    began = last = time.monotonic()
    count, before = done, done

    def add(more: int) -> None:
        nonlocal count, last
        count += more
        now = time.monotonic()
        if now - last < every and count < total:
            return
        last = now
        rate = (count - before) / max(now - began, 1e-9)
        left = f", {duration((total - count) / rate)} left" if count < total else ""
        console.print(
            f"{what}: {count:,} of {total:,}, {rate:,.0f} images/s{left}", highlight=False, markup=False, soft_wrap=True
        )

    return add


def indexing_progress(
    console: Console, path: Path, *, what: str = "indexing", every: float = 2.0
) -> Callable[[int], None]:
    """A callback for `open_source`: prints the number of images found so far, at most once in `every` seconds.

    What takes less time than that (a converted data set, a cached or a small folder) prints nothing.
    """
    last = time.monotonic()

    def show(found: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every:
            last = now
            console.print(f"{what} {path}: {found:,} images so far", highlight=False, markup=False, soft_wrap=True)

    return show


class _ConsoleHandler(logging.Handler):
    """Prints a record's message; warnings are marked."""

    def __init__(self, console: Console, *, level: int = logging.INFO, prefix: str = "") -> None:
        super().__init__(level)
        self._console = console
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        mark = f"[yellow]{record.levelname.lower()}:[/] " if record.levelno >= logging.WARNING else ""
        self._console.print(mark + escape(self._prefix + record.getMessage()), soft_wrap=True, highlight=False)


@contextmanager
def run_log(path: Path, console: Console, *, rank: int = 0) -> Iterator[None]:
    """Send the records of logger ``mvssl`` to the console (from INFO) and to the file (from DEBUG), while it lasts.

    A rank other than 0 writes no file; its warnings go to stderr, with its number.
    """
    logger = logging.getLogger("mvssl")
    handlers: list[logging.Handler]
    if rank == 0:
        file = logging.FileHandler(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers = [file, _ConsoleHandler(console)]
    else:
        handlers = [_ConsoleHandler(Console(stderr=True), level=logging.WARNING, prefix=f"rank {rank}: ")]
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        logger.debug("stopped by %s: %s", type(error).__name__, error)
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.propagate = propagate
