"""Interleaved trials, so that whatever else the machine does hits all implementations, and their statistics."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import reduce
from typing import Any

import torch

from benchmarks.harness.processes import Build, ImplementationFailed, Isolated, Memory, Trial
from pipelines.runtime import InputError

cuda: Any = torch.cuda  # Any: torch ships its events without types


class Budget:
    """Seconds that a benchmark may take from now on; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._began = time.monotonic()

    @property
    def spent(self) -> bool:
        """Whether nothing more may begin."""
        return self._seconds is not None and time.monotonic() - self._began >= self._seconds

    @property
    def reason(self) -> str:
        """Why something was left out."""
        return f"no time was left of the {self._seconds:g} s (--seconds)"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All trials so far.

    Attributes:
        trials: by implementation, without the warm-up; of those that did not fail.
        left_out: name of each process or implementation that could not take part, and why.
        failed: name of each process or implementation that failed, and its error.
    """

    trials: dict[str, list[Trial]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def leave_out(self, name: str, reason: str) -> None:
        """Note that this one does not take part."""
        self.left_out[name] = reason
        say(f"left out {name}: {reason}")

    def fail(self, name: str, error: Exception | str) -> None:
        """Note that this one failed, which makes its trials worthless."""
        self.failed[name] = str(error)
        self.trials.pop(name, None)
        say(f"FAILED {name}: {error}")


def say(words: str) -> None:
    """Print to stderr at once, for whoever waits or ends the command."""
    print(words, file=sys.stderr, flush=True)


def run_trials(
    builds: Mapping[str, Build],
    *,
    repeats: int,
    budget: Budget | None = None,
    save: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Run one warm-up and then `repeats` trials of each implementation of each process, interleaved.

    The processes are built at the same time, as most of that is imports. One that cannot take part, or fails, costs the
    others nothing. stderr says what begins and what each trial gave.

    Args:
        builds: the processes, the most important ones first.
        repeats: trials of each.
        budget: when to begin no more. Whoever has warmed up until then, which takes longest, still runs one trial.
        save: called after every trial that counts.
    """
    outcome, budget = Outcome(), budget or Budget(None)
    with ExitStack() as stack:
        entrants: dict[str, Isolated] = {}
        building: dict[str, Isolated] = {}
        began = time.monotonic()
        for process, build in builds.items():
            if budget.spent:
                outcome.leave_out(process, budget.reason)
                continue
            say(f"building {process} ...")
            building[process] = stack.enter_context(Isolated(process, build))
        for process, isolated in building.items():
            try:
                isolated.built()
            except InputError as error:
                outcome.leave_out(process, str(error))
            except ImplementationFailed as error:
                outcome.fail(process, error)
            else:
                say(f"built {process} after {time.monotonic() - began:.1f} s")
                entrants |= dict.fromkeys(isolated.names, isolated)
        for number in range(repeats + 1):
            for name in [name for name in entrants if name not in outcome.failed | outcome.left_out]:
                late = budget.spent
                if late and number == 0:
                    outcome.leave_out(name, budget.reason)
                if late and number != 1:
                    continue
                began = time.monotonic()
                try:
                    trial = entrants[name].trial(name)
                except (InputError, ImplementationFailed) as error:
                    outcome.fail(name, error)
                    continue
                which = f"trial {number} of {repeats}" if number > 0 else "warm-up"
                say(f"{which} of {name}: {_summary(trial)} (took {time.monotonic() - began:.1f} s)")
                if number > 0:
                    outcome.trials.setdefault(name, []).append(trial)
                    save(outcome)
    return outcome


def _summary(trial: Trial) -> str:
    """A trial's numbers in a few words."""
    report = trial.report
    if {"images", "seconds"} <= report.keys():
        cpu = (
            f", {1e3 * report['cpu_seconds'] / report['images']:.2f} ms of CPU each" if "cpu_seconds" in report else ""
        )
        return f"{report['images'] / report['seconds']:,.1f} images/s{cpu}"
    return ", ".join(f"{name} {value:,.3g}" for name, value in report.items() if isinstance(value, int | float))


def interleaved_seconds(
    works: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 0
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each function in this process, one after the other, after `warm_up` calls."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-warm_up, repeats):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def timed_on_device(results: Callable[[], Iterable[object]], device: torch.device) -> tuple[float, float]:
    """Seconds until the device has made all results, and until the host had queued them; on a CPU they are the same.

    On CUDA this is the time between two events in the current stream, with nothing queued before the first. Work in
    other streams counts if the current one waits for it.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        exhaust(results())
        seconds = time.perf_counter() - began
        return seconds, seconds
    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    begin.record()
    exhaust(results())
    end.record()
    host_seconds = time.perf_counter() - began
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, host_seconds


def exhaust(results: Iterable[object]) -> None:
    """Take every result and keep none."""
    deque(results, maxlen=0)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest and largest value and their number."""
    return {"min": min(values), "max": max(values), "n": len(values)}


def rates(trials: Sequence[Trial], *, views: int) -> dict[str, Any]:
    """Source images/s (median, spread) and views/s of trials that report "images" and "seconds"."""
    each = [_rate(trial) for trial in trials]
    median = statistics.median(each)
    return {"images_per_second": median, "views_per_second": median * views, "spread": spread(each)}


def peak_memory(trials: Sequence[Trial]) -> dict[str, Any]:
    """Peak memory in MiB over all trials."""
    return {"peak_memory_mib": asdict(reduce(Memory.__or__, [trial.memory for trial in trials]))}


def cpu_times(trials: Mapping[str, Sequence[Trial]], base: str) -> dict[str, dict[str, Any]]:
    """CPU time per image in milliseconds (median, spread) and how many times that of `base` it is, trial by trial."""

    def each(own: Sequence[Trial]) -> list[float]:
        return [1e3 * trial.report["cpu_seconds"] / trial.report["images"] for trial in own]

    result = {}
    for name, own in trials.items():
        spent = each(own)
        result[name] = {"cpu_milliseconds": {"median": statistics.median(spent), **spread(spent)}}
        if name != base and base in trials:
            times = [mine / theirs for mine, theirs in zip(spent, each(trials[base]), strict=False)]
            result[name]["times_cpu"] = {"median": statistics.median(times), **spread(times)}
    return result


def ratios(trials: Mapping[str, Sequence[Trial]], base: str) -> dict[str, dict[str, float]]:
    """How many times the images/s of `base` each other implementation has, trial by trial, as far as both have some."""
    result = {}
    for name, own in trials.items():
        if name != base and base in trials:
            # Without time for all, the last round is short.
            each = [_rate(mine) / _rate(theirs) for mine, theirs in zip(own, trials[base], strict=False)]
            result[name] = {"median": statistics.median(each), **spread(each)}
    return result


def _rate(trial: Trial) -> float:
    return float(trial.report["images"] / trial.report["seconds"])
