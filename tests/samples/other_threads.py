"""Whether other threads of Python run while something works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

EVERY = 0.001  # seconds


def share_of_ticks(work: Callable[[], object]) -> float:
    """How many of the ticks of a thread come that could, while `work` runs in this one: near 0 if it holds the lock."""
    ticks: list[float] = []
    done = threading.Event()

    def ticking() -> None:
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(EVERY)

    thread = threading.Thread(target=ticking)
    thread.start()
    began = time.monotonic()
    work()
    ended = time.monotonic()
    done.set()
    thread.join()
    return sum(began < tick < ended for tick in ticks) * EVERY / (ended - began)
