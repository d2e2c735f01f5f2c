"""Runs a loader next to a thread that never leaves Python, as the training thread hardly does; a program of its own.

    python gil_probe.py '{"data": ..., "batch_size": ..., "size": ..., "local_size": ..., "batches": ..., ...}'

It prints one line of JSON. It imports nothing of `benchmarks`, so that PYTHONPATH may name another version of the
project, whose loader is then measured.

The loop runs on one core and the loader's threads on another, so the loop loses time only to the GIL (and to other
programs): wall time less the thread's own CPU time, between the arrivals of two batches.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any


def measure(asked: dict[str, Any]) -> dict[str, float]:
    """Run the loop until `batches` batches have arrived or `seconds` are over; times cover the batches that arrived."""
    ours, theirs, *_ = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {theirs})  # inherited by every thread from here on

    import torch

    from pipelines.loader import Loader
    from pipelines.order import Order
    from pipelines.storage import open_source
    from pipelines.views.presets import paper_views

    torch.set_num_threads(1)
    source = open_source(asked["data"])
    views = paper_views(size=asked["size"], local_size=asked["local_size"], blur_kernel=asked["blur_kernel"])
    loader = Loader(source, views, Order(num_images=len(source), batch_size=asked["batch_size"], seed=0))
    arrived, stop = [0], threading.Event()

    def consume() -> None:
        epoch = 0
        while not stop.is_set():
            for _ in loader.epoch(epoch):
                arrived[0] += 1
                if stop.is_set():
                    return
            epoch += 1

    consumer = threading.Thread(target=consume)
    consumer.start()
    while arrived[0] < 2:  # until all threads run
        time.sleep(0.01)
    os.sched_setaffinity(0, {ours})
    marks: list[tuple[float, float]] = []  # wall and CPU time at arrivals
    seen, end = arrived[0], time.perf_counter() + asked["seconds"]
    while len(marks) <= asked["batches"] and time.perf_counter() < end:
        if arrived[0] != seen:
            seen = arrived[0]
            marks.append((time.perf_counter(), time.thread_time()))
    stop.set()
    consumer.join()
    loader.close()
    batches = max(1, len(marks) - 1)
    wall, own = (marks[-1][n] - marks[0][n] if len(marks) > 1 else 0.0 for n in (0, 1))
    return {"batches": len(marks) - 1, "wall": wall, "lost_milliseconds": 1e3 * (wall - own) / batches}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
