"""Names the bottleneck of a run and a remedy."""

from __future__ import annotations

import torch

from mvssl.monitor.cpu_use import CpuUse
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
    cpu: CpuUse | None = None,
    remote: bool = False,
) -> str:
    """Name the bottleneck and a remedy in a sentence.

    Args:
        data_wait: fraction of the training time in which the step waited for a batch, without the first one.
        stages: seconds that each loader thread worked. They work in parallel, so the slowest sets the loader's rate.
        images: source images they prepared in that time.
        device: where the step runs.
        images_per_second: source images/s of the run.
        idle: fractions of the training time in which the GPU had nothing queued, if measured.
        cpu: who used the cores in that time, if known. Others are the bottleneck of a step on the CPU; where the step
            waits for data or launches late they are named along with that.
        remote: whether images come from a URL.
    """
    seconds = {"storage": stages.storage, "decode": stages.decode, "views": stages.views}
    slowest = max(seconds, key=seconds.__getitem__)
    if seconds[slowest] <= 0 or images == 0:
        return "nothing was loaded"
    loader_rate = images / seconds[slowest]
    alone = f"the loader alone would prepare {rate(loader_rate)} images/s"
    wait = f"{100 * data_wait:.1f} % of the time"
    launching = 0.0 if idle is None else idle.launching(data_wait)
    on_gpu = device.type == "cuda"
    if cpu is not None and cpu.limited and (not on_gpu or data_wait > GOOD_WAIT or launching > LAUNCH_BOUND):
        return (
            f"the bottleneck is the container's CPU quota: {cpu.quota:.3g} cores, used up in "
            f"{100 * cpu.throttled:.0f} % of its periods, while {cpu.cores} cores are visible: raise the quota, or "
            f"set OMP_NUM_THREADS and --threads to {max(1, round(cpu.quota or 1))} (the step waited for data "
            f"{wait}; {alone})"
        )
    shares, others = "", ""
    if cpu is not None and cpu.neighbours:
        shares = f"used {cpu.others:.1f} of {cpu.cores} cores and this run {cpu.own:.1f}"
        others = f"; other processes {shares}"
    if launching > max(LAUNCH_BOUND, data_wait if data_wait > GOOD_WAIT else 0.0):
        return (
            f"the bottleneck is launching: the GPU had nothing queued {100 * launching:.1f} % of the time while the "
            "host was launching: use --cuda-graph auto (or on), so that a step is one launch; else --compile on, "
            "--step-mode joint, a larger --batch-size, and fewer --threads or other processes where the cores are "
            f"shared (the step waited for data {wait}; {alone}{others})"
        )
    if data_wait <= GOOD_WAIT or loader_rate >= LOADER_MARGIN * images_per_second:
        peaks = "" if data_wait <= GOOD_WAIT else ", in single moments"
        if shares and not on_gpu:
            return (
                f"the bottleneck is other processes on the same cores: they {shares}: stop them, or train when or "
                f"where the cores are free (the step waited for data {wait}{peaks}; {alone})"
            )
        busy = "" if idle is None else f" and kept the GPU busy {100 * (1 - idle.total):.1f} %"
        return f"the bottleneck is the step: it waited for data {wait}{peaks}{busy} ({alone})"
    remedies = {
        "storage": "reading images: convert them if they are plain files (mvssl-convert), then add --order-chunk 16 if "
        "the disk is slow at random reads, or put them on a faster disk",
        "decode": "decoding: use more --threads, convert with --max-size"
        + ("" if on_gpu else ", or train on a GPU, which decodes too"),
        "views": "making views: "
        + ("give the process more CPU cores" if on_gpu else "train on a GPU, or make smaller views"),
    }
    if remote:
        remedies["storage"] = (
            "the network, from which images come: give --remote.cache-size the size of the data, so that the next "
            "epoch reads the local disk, add --order-chunk 16, raise --remote.connections, or copy the data here"
        )
    part = f"{100 * seconds[slowest] / sum(seconds.values()):.0f} % of the work on a batch"
    return f"the bottleneck is {remedies[slowest]} ({part}; the step waited {wait}; {alone}{others})"
