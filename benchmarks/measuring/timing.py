"""Seconds that contenders take, in turns, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

cuda: Any = torch.cuda  # Any: torch ships its events without types


@dataclass(frozen=True, kw_only=True)
class Times:
    """What the turns of one contender took.

    Attributes:
        seconds: of each turn, from its start until its last result is there.
        host_seconds: of each turn, until the host had queued everything; on a CPU the same.
    """

    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)


def drain(results: Iterable[object]) -> None:
    """Take every result and keep none."""
    deque(results, maxlen=0)


def take_turns(
    contenders: Mapping[str, Callable[[], Iterable[object]]], *, repeats: int, device: torch.device
) -> dict[str, Times]:
    """Let every contender make all its results once, and again, `repeats` times; the warm-up is the caller's.

    On CUDA the time between two events in the current stream counts, with nothing queued before the first. A contender
    that works in streams of its own must make the current one wait for its results.
    """
    times = {name: Times() for name in contenders}
    for _ in range(repeats):
        for name, make in contenders.items():
            seconds, host_seconds = _cuda_turn(make, device) if device.type == "cuda" else _cpu_turn(make)
            times[name].seconds.append(seconds)
            times[name].host_seconds.append(host_seconds)
    return times


def _cpu_turn(make: Callable[[], Iterable[object]]) -> tuple[float, float]:
    """Seconds of one turn on the CPU, twice."""
    began = time.perf_counter()
    drain(make())
    seconds = time.perf_counter() - began
    return seconds, seconds


def _cuda_turn(make: Callable[[], Iterable[object]], device: torch.device) -> tuple[float, float]:
    """Seconds of one turn between CUDA events, and of the host alone."""
    begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    begin.record()
    drain(make())
    end.record()
    host_seconds = time.perf_counter() - began
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, host_seconds
