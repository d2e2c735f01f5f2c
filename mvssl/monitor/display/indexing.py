"""Signs of life while a large folder is indexed for the first time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console


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
