"""The stall clock: how long the step, and the GPU, wait for data; and what limits a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.loader_stats import StageSeconds

GOOD = 0.01
"""Share of the time that a step may wait for data: the loader keeps up."""

cuda: Any = torch.cuda  # Any: torch ships its events without types


class DeviceClock:
    """Measures the gaps on a GPU between the end of one step and the beginning of the next, without waiting for it.

    A gap holds the wait for a batch that is not ready and the host's time to launch. On the CPU it measures nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: list[tuple[Any, Any]] = []  # end of a step, beginning of the next
        self._last_end: Any = None
        self._first: Any = None  # where the time since the last reading begins

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enter with the batch received (its ready event awaited by the stream), leave behind the step's launches."""
        if self._device.type != "cuda":
            yield
            return
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        if self._last_end is not None:
            self._pairs.append((self._last_end, begin))
        self._first = self._first or self._last_end or begin
        yield
        end.record()
        self._last_end = end

    def interrupt(self) -> None:
        """What comes next (an evaluation, a save) is no gap between two steps."""
        self._last_end = None

    def idle_share(self) -> float | None:
        """Share of the time since the last reading that the GPU was idle between steps; None without one.

        To be called where the host has waited for the device already (at a log point).
        """
        if self._first is None or self._last_end is None:
            return None
        whole = float(self._first.elapsed_time(self._last_end))
        idle = sum(float(end.elapsed_time(begin)) for end, begin in self._pairs)
        self._pairs, self._first = [], None
        return min(max(idle / whole, 0.0), 1.0) if whole > 0 else None


def what_limits(wait: float, stages: StageSeconds, images: int, *, device: torch.device) -> str:
    """Say in a sentence what limits a run, and what to change.

    Args:
        wait: share of the training time that the step waited for batches, in [0, 1].
        stages: seconds of the thread that prepares batches.
        images: source images it prepared in them.
        device: where the step runs.
    """
    total = stages.storage + stages.decode + stages.views
    if total <= 0 or images == 0:
        return "nothing was loaded"
    rate = f"the loader alone would prepare {images / total:,.0f} images/s"
    if wait <= GOOD:
        return f"the step limits the run: it waited for data {100 * wait:.1f} % of the time ({rate})"
    name, seconds = max(
        (("storage", stages.storage), ("decode", stages.decode), ("views", stages.views)), key=lambda stage: stage[1]
    )
    remedies = {
        "storage": "reading the images limits the run: convert them if they are plain files (mvssl-convert), then add "
        "--order-chunk 16 where the disk is slow at random places, or put them on a faster disk",
        "decode": "decoding limits the run: give it more --threads, convert with --max-size"
        + ("" if device.type == "cuda" else ", or train on a GPU, which decodes too"),
        "views": "making the views limits the run: "
        + ("give the process more CPU cores" if device.type == "cuda" else "train on a GPU, or make smaller views"),
    }
    share = f"{100 * seconds / total:.0f} % of preparing a batch"
    return f"{remedies[name]} ({share}; the step waited {100 * wait:.1f} % of the time; {rate})"
