"""Turns of contenders in processes of their own, and what is made of them."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import reduce
from typing import Any

from benchmarks.measuring.isolated import Build, ContenderFailed, Isolated, Turn
from benchmarks.measuring.process_memory import largest
from pipelines.runtime import InputError


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of all turns so far.

    Attributes:
        turns: by contender, without the warm-up; of those that did not fail.
        missing: name of each process or contender that could not take part, and why.
        failed: name of each process or contender that failed, and its error.
    """

    turns: dict[str, list[Turn]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Budget:
    """Seconds that a benchmark may take from now on; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._began = time.monotonic()

    @property
    def spent(self) -> bool:
        """Whether nothing may be begun any more."""
        return self._seconds is not None and time.monotonic() - self._began >= self._seconds

    @property
    def reason(self) -> str:
        """Why something was left out."""
        return f"no time was left of the {self._seconds:g} s (--seconds)"


def take_turns(
    builds: Mapping[str, Build],
    *,
    repeats: int,
    budget: Budget | None = None,
    keep: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Let each contender of each process warm up with one turn and then take `repeats`, all in turns.

    The processes are built at the same time, as most of that is imports. Who cannot take part, or fails, costs the
    others nothing. stderr says what begins and what came of it.

    Args:
        builds: the processes, the most important ones first.
        repeats: turns of each.
        budget: when to begin no more. Who has warmed up until then, which is what takes long, takes one turn.
        keep: called after every turn that counts, to save what there is.
    """
    outcome, budget = Outcome(), budget or Budget(None)
    with ExitStack() as stack:
        entrants: dict[str, Isolated] = {}
        building: dict[str, Isolated] = {}
        began = time.monotonic()
        for process, build in builds.items():
            if budget.spent:
                _leave_out(outcome, process, budget.reason)
                continue
            _say(f"building {process} ...")
            building[process] = stack.enter_context(Isolated(process, build))
        for process, isolated in building.items():
            try:
                isolated.built()
            except InputError as error:
                _leave_out(outcome, process, str(error))
            except ContenderFailed as error:
                _note_failure(outcome, process, error)
            else:
                _say(f"built {process} after {time.monotonic() - began:.1f} s")
                entrants |= dict.fromkeys(isolated.contenders, isolated)
        for number in range(repeats + 1):
            for name in [name for name in entrants if name not in outcome.failed | outcome.missing]:
                late = budget.spent
                if late and number == 0:
                    _leave_out(outcome, name, budget.reason)
                if late and number != 1:
                    continue
                began = time.monotonic()
                try:
                    turn = entrants[name].turn(name)
                except (InputError, ContenderFailed) as error:
                    _note_failure(outcome, name, error)
                    continue
                which = f"turn {number} of {repeats}" if number > 0 else "warm-up"
                _say(f"{which} of {name}: {_summary(turn)} (took {time.monotonic() - began:.1f} s)")
                if number > 0:
                    outcome.turns.setdefault(name, []).append(turn)
                    keep(outcome)
    return outcome


def _summary(turn: Turn) -> str:
    """What a turn came to, in a few words."""
    report = turn.report
    if {"images", "seconds"} <= report.keys():
        return f"{report['images'] / report['seconds']:,.1f} images/s"
    return ", ".join(f"{name} {value:,.3g}" for name, value in report.items() if isinstance(value, int | float))


def _say(words: str) -> None:
    """At once, so that who waits, or ends the command, knows where it stands."""
    print(words, file=sys.stderr, flush=True)


def _leave_out(outcome: Outcome, name: str, reason: str) -> None:
    outcome.missing[name] = reason
    _say(f"left out {name}: {reason}")


def _note_failure(outcome: Outcome, name: str, error: Exception) -> None:
    outcome.failed[name] = str(error)
    outcome.turns.pop(name, None)
    _say(f"FAILED {name}: {error}")


def rates(turns: Sequence[Turn], *, views: int) -> dict[str, Any]:
    """Source images/s (median, spread), views/s and peak memory of turns that report "images" and "seconds"."""
    each = [turn.report["images"] / turn.report["seconds"] for turn in turns]
    return {
        "images_per_second": statistics.median(each),
        "views_per_second": statistics.median(each) * views,
        "spread": {"min": min(each), "max": max(each), "n": len(each)},
        "peak_memory_mib": asdict(reduce(largest, [turn.memory for turn in turns])),
    }


def ratios(turns: Mapping[str, Sequence[Turn]], base: str) -> dict[str, dict[str, float]]:
    """How many times the images/s of `base` each other contender has, turn by turn, as far as both have turns."""
    result = {}
    for name, own in turns.items():
        if name != base and base in turns:
            each = [
                (mine.report["images"] / mine.report["seconds"]) / (theirs.report["images"] / theirs.report["seconds"])
                for mine, theirs in zip(own, turns[base], strict=False)  # without time for all, the last round is short
            ]
            result[name] = {"median": statistics.median(each), "min": min(each), "max": max(each), "n": len(each)}
    return result
