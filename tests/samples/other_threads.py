"""Counts how often another Python thread runs during a call, to see whether the call releases the GIL."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

RELEASED = 100  # turns at least while the GIL is released for milliseconds; a call that holds it allows a few


def turns_of_another_thread(work: Callable[[], object]) -> int:
    """How many times another thread takes the GIL while `work` runs, which is asked for it by nobody."""
    turns = 0
    done = threading.Event()

    def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0)  # releases the GIL

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    thread.start()
    try:
        sys.setswitchinterval(1000.0)  # seconds: Python code keeps the GIL, only C code releases it
        before = turns
        work()
        return turns - before
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
