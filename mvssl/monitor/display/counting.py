"""Signs of life of work whose end is known: how many of how many, how fast, how long still."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from mvssl.monitor.display.progress import duration


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
