"""What limits a run, in a sentence, and what to change."""

from __future__ import annotations

import torch

from mvssl.monitor.device_clock import Shares
from pipelines.loader import StageSeconds

GOOD = 0.01
"""Share of the time that a step may wait for data: the loader keeps up."""

BEHIND = 0.05
"""Share of the time above which a GPU that has nothing queued while the host launches is worth a remedy."""


AHEAD = 1.5
"""Times the run's images/s that a loader makes which does not hold it up, whatever single waits there were."""


def what_limits(
    wait: float,
    stages: StageSeconds,
    images: int,
    *,
    device: torch.device,
    pace: float,
    shares: Shares | None = None,
) -> str:
    """Say in a sentence what limits a run, and what to change.

    Args:
        wait: share of the training time that the step waited for batches, in [0, 1], but for the first one.
        stages: seconds of the threads that prepare batches, which work at the same time: the slowest sets their pace.
        images: source images they prepared in them.
        device: where the step runs.
        pace: source images/s of the run.
        shares: of that time in which the GPU had nothing queued, if it is known.
    """
    if max(stages.storage, stages.decode, stages.views) <= 0 or images == 0:
        return "nothing was loaded"
    name, seconds = max(
        (("storage", stages.storage), ("decode", stages.decode), ("views", stages.views)), key=lambda stage: stage[1]
    )
    alone = images / seconds
    rate = f"the loader alone would prepare {alone:,.0f} images/s"
    launching = 0.0 if shares is None else shares.launching(wait)
    if launching > max(BEHIND, wait if wait > GOOD else 0.0):
        return (
            f"launching limits the run: the GPU had nothing queued {100 * launching:.1f} % of the time while the host "
            "was launching: take --cuda-graph auto (or on), so that a step is one launch; else --compile on, "
            "--step-mode joint, a larger --batch-size, and fewer --threads or other processes where the cores are "
            f"shared (the step waited for data {100 * wait:.1f} % of the time; {rate})"
        )
    if wait <= GOOD or alone >= AHEAD * pace:
        busy = "" if shares is None else f" and kept the GPU busy {100 * (1 - shares.idle):.1f} %"
        seldom = "" if wait <= GOOD else ", in single moments"
        return f"the step limits the run: it waited for data {100 * wait:.1f} % of the time{seldom}{busy} ({rate})"
    remedies = {
        "storage": "reading the images limits the run: convert them if they are plain files (mvssl-convert), then add "
        "--order-chunk 16 where the disk is slow at random places, or put them on a faster disk",
        "decode": "decoding limits the run: give it more --threads, convert with --max-size"
        + ("" if device.type == "cuda" else ", or train on a GPU, which decodes too"),
        "views": "making the views limits the run: "
        + ("give the process more CPU cores" if device.type == "cuda" else "train on a GPU, or make smaller views"),
    }
    total = stages.storage + stages.decode + stages.views
    share = f"{100 * seconds / total:.0f} % of the work on a batch"
    return f"{remedies[name]} ({share}; the step waited {100 * wait:.1f} % of the time; {rate})"
