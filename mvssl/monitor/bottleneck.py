"""Names the bottleneck of a run and a remedy."""

from __future__ import annotations

import torch

from mvssl.monitor.idle_sampler import IdleFractions
from pipelines.loader import StageSeconds
from pipelines.progress import rate

GOOD_WAIT = 0.01
"""Data wait up to which the loader keeps up with the step."""

LAUNCH_BOUND = 0.05
"""Idle fraction above which launch overhead is worth a remedy."""

LOADER_MARGIN = 1.5
"""A loader that is this many times as fast as the run is no bottleneck, even if the step waited now and then."""


def describe_bottleneck(
    data_wait: float,
    stages: StageSeconds,
    images: int,
    *,
    device: torch.device,
    images_per_second: float,
    idle: IdleFractions | None = None,
) -> str:
    """Name the bottleneck and a remedy in a sentence.

    Args:
        data_wait: fraction of the training time in which the step waited for a batch, without the first one.
        stages: seconds that each loader thread worked. They work in parallel, so the slowest sets the loader's rate.
        images: source images they prepared in that time.
        device: where the step runs.
        images_per_second: source images/s of the run.
        idle: fractions of the training time in which the GPU had nothing queued, if measured.
    """
    seconds = {"storage": stages.storage, "decode": stages.decode, "views": stages.views}
    slowest = max(seconds, key=seconds.__getitem__)
    if seconds[slowest] <= 0 or images == 0:
        return "nothing was loaded"
    loader_rate = images / seconds[slowest]
    alone = f"the loader alone would prepare {rate(loader_rate)} images/s"
    wait = f"{100 * data_wait:.1f} % of the time"
    launching = 0.0 if idle is None else idle.launching(data_wait)
    if launching > max(LAUNCH_BOUND, data_wait if data_wait > GOOD_WAIT else 0.0):
        return (
            f"the bottleneck is launching: the GPU had nothing queued {100 * launching:.1f} % of the time while the "
            "host was launching: use --cuda-graph auto (or on), so that a step is one launch; else --compile on, "
            "--step-mode joint, a larger --batch-size, and fewer --threads or other processes where the cores are "
            f"shared (the step waited for data {wait}; {alone})"
        )
    if data_wait <= GOOD_WAIT or loader_rate >= LOADER_MARGIN * images_per_second:
        peaks = "" if data_wait <= GOOD_WAIT else ", in single moments"
        busy = "" if idle is None else f" and kept the GPU busy {100 * (1 - idle.total):.1f} %"
        return f"the bottleneck is the step: it waited for data {wait}{peaks}{busy} ({alone})"
    on_gpu = device.type == "cuda"
    remedies = {
        "storage": "reading images: convert them if they are plain files (mvssl-convert), then add --order-chunk 16 if "
        "the disk is slow at random reads, or put them on a faster disk",
        "decode": "decoding: use more --threads, convert with --max-size"
        + ("" if on_gpu else ", or train on a GPU, which decodes too"),
        "views": "making views: "
        + ("give the process more CPU cores" if on_gpu else "train on a GPU, or make smaller views"),
    }
    part = f"{100 * seconds[slowest] / sum(seconds.values()):.0f} % of the work on a batch"
    return f"the bottleneck is {remedies[slowest]} ({part}; the step waited {wait}; {alone})"
