"""Turns of contenders in processes of their own, and what is made of them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import reduce
from typing import Any

from benchmarks.isolated import Build, ContenderFailed, Isolated, Turn
from benchmarks.process_memory import largest
from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of all turns.

    Attributes:
        turns: by contender, without the warm-up; of those that took all of them.
        missing: name of each process whose contenders this machine cannot run, and why.
        failed: name of each process or contender that failed, and its error.
    """

    turns: dict[str, list[Turn]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def take_turns(builds: Mapping[str, Build], *, repeats: int) -> Outcome:
    """Let each contender of each process warm up with one turn and then take `repeats`, all in turns.

    Who cannot take part, or fails, costs the others nothing; stderr says who it is and why.
    """
    outcome = Outcome()
    with ExitStack() as stack:
        entrants: dict[str, Isolated] = {}
        for process, build in builds.items():
            try:
                isolated = stack.enter_context(Isolated(process, build))
            except InputError as error:
                outcome.missing[process] = str(error)
                print(f"left out {process}: {error}", file=sys.stderr)
            except ContenderFailed as error:
                _note_failure(outcome, process, error)
            else:
                entrants |= dict.fromkeys(isolated.contenders, isolated)
        for number in range(repeats + 1):
            for name in [name for name in entrants if name not in outcome.failed]:
                try:
                    turn = entrants[name].turn(name)
                except (InputError, ContenderFailed) as error:
                    _note_failure(outcome, name, error)
                    continue
                if number > 0:
                    outcome.turns.setdefault(name, []).append(turn)
    return outcome


def _note_failure(outcome: Outcome, name: str, error: Exception) -> None:
    outcome.failed[name] = str(error)
    outcome.turns.pop(name, None)
    print(f"FAILED {name}: {error}", file=sys.stderr)


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
    """How many times the images/s of `base` each other contender has, turn by turn."""
    result = {}
    for name, own in turns.items():
        if name != base and base in turns:
            each = [
                (mine.report["images"] / mine.report["seconds"]) / (theirs.report["images"] / theirs.report["seconds"])
                for mine, theirs in zip(own, turns[base], strict=True)
            ]
            result[name] = {"median": statistics.median(each), "min": min(each), "max": max(each), "n": len(each)}
    return result
