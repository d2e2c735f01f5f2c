"""Profiles training steps: launches, kernels by time, and how long host and device are busy."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_LAUNCHES = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")
"""Occur in the names of CUDA calls that queue work: cudaLaunchKernel, cuLaunchKernelEx, cudaMemcpyAsync, ..."""
_LAUNCH_BOUND = 0.9  # fraction of a step's time that the host needs to launch it, from which on launching is the limit


class Span(NamedTuple):
    """A kernel, copy or fill: its name, begin and end in microseconds."""

    name: str
    begin: float
    end: float


class Entry(NamedTuple):
    """All kernels (on the CPU: operators) of one name: milliseconds and number per step."""

    name: str
    milliseconds: float
    number: float


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Averages per step.

    Attributes:
        milliseconds: of consecutive steps, without the profiler.
        host_milliseconds: until the call of a step returns, if the device is idle before.
        launches: CUDA calls that queue work; None on the CPU.
        kernels: kernels, copies and fills; None on the CPU.
        busy_milliseconds: in which the device works on at least one of them; None on the CPU.
        entries: kernels, or on the CPU operators without those they call, the longest first.
    """

    milliseconds: float
    host_milliseconds: float
    launches: float | None
    kernels: float | None
    busy_milliseconds: float | None
    entries: tuple[Entry, ...]

    @property
    def busy_share(self) -> float | None:
        """Fraction of a step in which the device works, at most 1."""
        return None if self.busy_milliseconds is None else min(1.0, self.busy_milliseconds / self.milliseconds)

    def bottleneck(self) -> str:
        """What keeps the device from working all the time, in words."""
        if self.busy_share is None:
            return "the CPU does all the work"
        if self.busy_share >= 0.98:
            return "none: the GPU works all the time"
        if self.host_milliseconds >= _LAUNCH_BOUND * self.milliseconds:
            return "launching: the host takes as long to launch a step as the step takes (--cuda-graph, --compile)"
        return "gaps between kernels: the host is ahead"


def profile_steps(step: Callable[[], object], *, steps: int, device: torch.device) -> StepProfile:
    """Profile a step that has warmed up (compiled, captured).

    Args:
        step: takes one step without waiting for the device.
        steps: number of steps of each of three measurements: consecutive, one at a time, under the profiler.
        device: where the steps run.
    """
    _configure_profiler()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    seconds = time.perf_counter() - began
    host = 0.0
    for _ in range(steps):
        began = time.perf_counter()
        step()
        host += time.perf_counter() - began
        synchronize(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    kernels = device_spans(profiler.events())
    return StepProfile(
        milliseconds=1e3 * seconds / steps,
        host_milliseconds=1e3 * host / steps,
        launches=count_launches(profiler.events()) / steps if cuda else None,
        kernels=len(kernels) / steps if cuda else None,
        busy_milliseconds=covered(kernels) / 1e3 / steps if cuda else None,
        entries=time_by_name(kernels, steps=steps) if cuda else _operators(profiler, steps=steps),
    )


def write_trace(step: Callable[[], object], *, steps: int, device: torch.device, path: Path) -> None:
    """Write a trace of some steps for Perfetto or chrome://tracing (`path` ends in .gz)."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    profiler.export_chrome_trace(str(path))


def format_table(entries: Sequence[Entry], *, milliseconds: float, rows: int) -> list[str]:
    """Table lines: the first `rows` entries with their fraction of a step of `milliseconds`, and the rest as one."""
    shown, others = entries[:rows], entries[rows:]
    if others:
        left = Entry(f"({len(others)} others)", sum(e.milliseconds for e in others), sum(e.number for e in others))
        shown = [*shown, left]
    lines = [f"{'ms a step':>10} {'share':>7} {'times':>8}  name"]
    for name, spent, number in shown:
        lines.append(f"{spent:10.3f} {100 * spent / milliseconds:6.1f}% {number:8.1f}  {name[:160]}")
    return lines


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_spans(events: Iterable[Any]) -> list[Span]:
    """The kernels, copies and fills among a profiler's events."""
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def count_launches(events: Iterable[Any]) -> int:
    """Number of CUDA calls among a profiler's events that queue work."""
    return sum(
        event.device_type == DeviceType.CPU
        and event.name.startswith(("cuda", "cu"))
        and any(word in event.name for word in _LAUNCHES)
        for event in events
    )


def covered(spans: Iterable[Span]) -> float:
    """Microseconds that at least one of the spans covers."""
    total, last = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        total += max(0.0, span.end - max(span.begin, last))
        last = max(last, span.end)
    return total


def time_by_name(spans: Iterable[Span], *, steps: int) -> tuple[Entry, ...]:
    """Time and number per step of each name, the longest time first."""
    spent: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        spent[span.name].append(span.end - span.begin)
    return _longest_first(Entry(name, sum(times) / 1e3 / steps, len(times) / steps) for name, times in spent.items())


def _operators(profiler: Any, *, steps: int) -> tuple[Entry, ...]:
    """CPU operators by self time."""
    return _longest_first(
        Entry(average.key, average.self_cpu_time_total / 1e3 / steps, average.count / steps)
        for average in profiler.key_averages()
    )


def _longest_first(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: -entry.milliseconds))


def _configure_profiler() -> None:
    """Keep CUPTI attached (detaching it between two profiles breaks CUDA graphs, says torch.profiler), and quiet."""
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
