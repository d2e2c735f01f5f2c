"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY = 5.0  # seconds between plain lines


class IndexProgress:
    """A line now and then while images are being found; call it with their number."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._next_line = time.monotonic() + _LINE_EVERY

    def __call__(self, count: int) -> None:
        """Say that `count` images were found so far."""
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY
            self._console.print(f"indexing: {count} images", highlight=False)


class ConversionProgress:
    """Counts images of one conversion; use as a context manager."""

    def __init__(self, title: str, *, total: int, finished: int, console: Console | None = None) -> None:
        """`finished` of `total` images are done before this run."""
        self._console = console or Console(stderr=True)
        self._title = title
        self._total = total
        self._start = time.monotonic()
        self._next_line = self._start + _LINE_EVERY
        self.finished = finished
        self.this_run = 0
        self.bad = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} images/s, {task.fields[bad]} bad"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=finished, rate=0.0, bad=0)

    @property
    def seconds(self) -> float:
        """Since the start of this run."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Images per second of this run."""
        return self.this_run / max(self.seconds, 1e-9)

    def advance(self, *, bad: bool) -> None:
        """One more image."""
        self.finished += 1
        self.this_run += 1
        self.bad += bad
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self.finished, rate=self.rate, bad=self.bad)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY
            left = (self._total - self.finished) / max(self.rate, 1e-9)
            self._console.print(
                f"{self._title}: {self.finished} of {self._total} images, {self.rate:.0f} images/s, {self.bad} bad, "
                f"{left:.0f} s left",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )

    def __enter__(self) -> ConversionProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
