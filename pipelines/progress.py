"""Progress of work that is counted in images, on the console."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from pipelines.names import say, visible

_WORK = 120  # characters of what is done


class Progress:
    """Prints how many images some work has done: a line every few seconds, and one when the total is reached.

    Without a total it prints nothing for work that takes less than those seconds. As a context manager it shows a bar
    on a terminal, and prints no last line: the caller prints a summary.

    Attributes:
        done: images done, including those of an earlier run.
    """

    def __init__(self, console: Console, work: str, *, total: int | None = None, done: int = 0) -> None:
        """`work` names it, such as "features of data/train"; `done` images were done by an earlier run."""
        self.done = done
        self._console = console
        self._work = visible(work, _WORK)
        self._total = total
        self._before = done
        self._began = self._printed = time.monotonic()
        self._every = 2.0 if total is None else 5.0  # seconds
        self._bar: Bar | None = None
        self._last_line = total is not None

    @property
    def done_now(self) -> int:
        """Images done by this run."""
        return self.done - self._before

    @property
    def seconds(self) -> float:
        """Duration of this run so far."""
        return max(time.monotonic() - self._began, 1e-9)

    def add(self, more: int = 1, *, note: str = "") -> None:
        """Count `more` images; `note` is shown after the speed."""
        self.update(self.done + more, note=note)

    def update(self, done: int, *, note: str = "") -> None:
        """Set the number of images done so far; `note` is shown after the speed."""
        self.done = done
        now = time.monotonic()
        per_second = self.done_now / max(now - self._began, 1e-9)
        speed = visible(f"{rate(per_second)} images/s" + (f", {note}" if note else ""), _WORK)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, speed=speed)
            return
        finished = self._total is not None and done >= self._total
        if now - self._printed < self._every and not (finished and self._last_line):
            return
        self._printed = now
        if self._total is None:
            state = f"{done:,} images so far, {duration(now - self._began)}"
        else:
            left = f", {duration((self._total - done) / per_second)} left" if per_second and not finished else ""
            state = f"{done:,} of {self._total:,}, {speed}{left}"
        say(self._console, f"{self._work}: {state}")

    def __enter__(self) -> Progress:
        self._last_line = False
        if self._console.is_terminal and self._total is not None:
            work, speed = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[speed]}"))
            columns = (work, BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
            self._bar = Bar(*columns, console=self._console)
            self._bar.add_task(self._work, total=self._total, completed=self.done, speed="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(count: int, what: str, many: str = "") -> str:
    """ "1 Parquet file", "3 Parquet files"."""
    return f"{count:,} {what if count == 1 else many or f'{what}s'}"


def rate(per_second: float) -> str:
    """A number per second: with a decimal below 100, and two digits below 1, so that slow work is not shown as 0."""
    if per_second >= 100:
        return f"{per_second:,.0f}"
    return f"{per_second:.1f}" if per_second >= 1 or not per_second else f"{per_second:.2g}"
