"""What a step costs on host and device: launches, kernels by time, and how long the device works."""

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
"""Parts of the names of CUDA calls that hand work to the device: cudaLaunchKernel, cuLaunchKernelEx, and so on."""
_WAITING = 0.9  # share of a step's time after which the host, which returned only then, is what the step waits for


class Span(NamedTuple):
    """Something that took time: its name, begin and end in microseconds."""

    name: str
    begin: float
    end: float


class Entry(NamedTuple):
    """What has one name: milliseconds and number in a step."""

    name: str
    milliseconds: float
    number: float


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """One step, on average over some.

    Attributes:
        milliseconds: from step to step, nothing but steps being done, without the profiler.
        host_milliseconds: until the call of a step returns, the device having nothing to do before.
        launches: calls that hand work to the device; None on the CPU.
        kernels: pieces of work the device does, copies included; None on the CPU.
        busy_milliseconds: in which the device works on at least one; None on the CPU.
        entries: kernels, or on the CPU operators, by time (without what they call), the largest first.
    """

    milliseconds: float
    host_milliseconds: float
    launches: float | None
    kernels: float | None
    busy_milliseconds: float | None
    entries: tuple[Entry, ...]

    @property
    def busy_share(self) -> float | None:
        """Share of a step in which the device works, at most 1."""
        return None if self.busy_milliseconds is None else min(1.0, self.busy_milliseconds / self.milliseconds)

    def what_holds(self) -> str:
        """In words, what the device waits for while it does not work."""
        if self.busy_share is None:
            return "the processor does all of it"
        if self.busy_share >= 0.98:
            return "nothing: the GPU works all the time"
        if self.host_milliseconds >= _WAITING * self.milliseconds:
            return "launching: the host takes as long to launch a step as the step takes (--cuda-graph, --compile)"
        return "gaps between kernels: the host is ahead"


def union(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one of the spans is going on."""
    total, last = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        total += max(0.0, span.end - max(span.begin, last))
        last = max(last, span.end)
    return total


def by_name(spans: Iterable[Span], *, steps: int) -> tuple[Entry, ...]:
    """Time and number a step of each name, the largest time first."""
    spent: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        spent[span.name].append(span.end - span.begin)
    entries = (Entry(name, sum(times) / 1e3 / steps, len(times) / steps) for name, times in spent.items())
    return tuple(sorted(entries, key=lambda entry: -entry.milliseconds))


def profile_steps(step: Callable[[], object], *, steps: int, device: torch.device) -> StepProfile:
    """Measure a step that has warmed up (compiled, recorded).

    Args:
        step: takes one step and does not wait for it.
        steps: how often, each time of three: timed from step to step, one by one, and under the profiler.
        device: where the work is done.
    """
    _prepare()
    wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    seconds = time.perf_counter() - began
    host = 0.0
    for _ in range(steps):
        began = time.perf_counter()
        step()
        host += time.perf_counter() - began
        wait(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(steps):
            step()
        wait(device)
    kernels = spans_on_device(profiler.events())
    entries = by_name(kernels, steps=steps) if cuda else _operators(profiler, steps=steps)
    return StepProfile(
        milliseconds=1e3 * seconds / steps,
        host_milliseconds=1e3 * host / steps,
        launches=count_launches(profiler.events()) / steps if cuda else None,
        kernels=len(kernels) / steps if cuda else None,
        busy_milliseconds=union(kernels) / 1e3 / steps if cuda else None,
        entries=entries,
    )


def write_trace(step: Callable[[], object], *, steps: int, device: torch.device, path: Path) -> None:
    """Write what host and device do in some steps as a trace for Perfetto or chrome://tracing (`path` ends in .gz)."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        wait(device)
    profiler.export_chrome_trace(str(path))


def spans_on_device(events: Iterable[Any]) -> list[Span]:
    """The device's work among a profiler's events: kernels, copies and fills."""
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def count_launches(events: Iterable[Any]) -> int:
    """Calls on the host among a profiler's events that hand work to the device."""
    return sum(
        event.device_type == DeviceType.CPU
        and event.name.startswith(("cuda", "cu"))
        and any(word in event.name for word in _LAUNCHES)
        for event in events
    )


def table(entries: Sequence[Entry], *, milliseconds: float, rows: int) -> list[str]:
    """Lines of plain text: the entries that take longest, and what the others take together."""
    shown, others = entries[:rows], entries[rows:]
    if others:
        left = Entry(f"({len(others)} others)", sum(e.milliseconds for e in others), sum(e.number for e in others))
        shown = [*shown, left]
    lines = [f"{'ms a step':>10} {'share':>7} {'times':>8}  name"]
    for name, spent, number in shown:
        lines.append(f"{spent:10.3f} {100 * spent / milliseconds:6.1f}% {number:8.1f}  {name[:160]}")
    return lines


def _operators(profiler: Any, *, steps: int) -> tuple[Entry, ...]:
    """The CPU's operators by their own time."""
    entries = (
        Entry(average.key, average.self_cpu_time_total / 1e3 / steps, average.count / steps)
        for average in profiler.key_averages()
    )
    return tuple(sorted(entries, key=lambda entry: -entry.milliseconds))


def _prepare() -> None:
    """Keep the profiler's hooks: taken out between two profiles they break CUDA graphs (torch.profiler's own rule).

    And let it report errors only to who asks for them.
    """
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def wait(device: torch.device) -> None:
    """Until the device has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
