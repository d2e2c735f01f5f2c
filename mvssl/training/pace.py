"""Pace of a training run: images/s and data wait of the last steps, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(kw_only=True)
class _Mark:
    """A moment of a run.

    Attributes:
        step: optimiser steps done.
        time: of the clock, in seconds; later pauses move it on.
        waited: seconds that steps had waited for batches.
    """

    step: int
    time: float
    waited: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed of some steps.

    Attributes:
        seconds: they took.
        images_per_second: source images of all ranks per second.
        data_wait: fraction of the time in which they waited for a batch.
    """

    seconds: float
    images_per_second: float
    data_wait: float


class Pace:
    """Measures a run's speed since its last log point and since its first step, without pauses."""

    def __init__(self, *, step: int, batch_size: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """`step` optimiser steps were done before, of `batch_size` images over all ranks."""
        self._clock = clock
        self._batch_size = batch_size
        self._start = _Mark(step=step, time=clock())
        self._logged = _Mark(step=step, time=self._start.time)
        self._warm: _Mark | None = None  # after the first step, which includes start-up and compilation

    @property
    def seconds(self) -> float:
        """Since the start or resumption of the run."""
        return self._clock() - self._start.time

    @property
    def started(self) -> bool:
        """Whether a step is done."""
        return self._warm is not None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out this time."""
        began = self._clock()
        yield
        pause = self._clock() - began
        for mark in filter(None, (self._start, self._logged, self._warm)):
            mark.time += pause

    def stepped(self, step: int, waited: float) -> None:
        """Note the first step of this run; `waited` seconds were spent waiting for batches so far."""
        self._warm = self._warm or _Mark(step=step, time=self._clock(), waited=waited)

    def log_point(self, step: int, waited: float) -> Speed:
        """Speed since the last log point; the next one counts from here."""
        now = self._clock()
        speed = self._since(self._logged, step, now, waited)
        self._logged = _Mark(step=step, time=now, waited=waited)
        self._warm = self._warm or _Mark(step=step, time=now, waited=waited)
        return speed

    def recent(self, step: int, waited: float) -> Speed:
        """Speed since the last log point, or since the first step if that came later."""
        begin = self._logged
        if self._warm is not None and begin.step < self._warm.step < step:
            begin = self._warm
        return self._since(begin, step, self._clock(), waited)

    def seconds_left(self, step: int, total: int) -> float:
        """Estimated time to step `total`; start-up is counted only until a second step is done."""
        begin = self._start if self._warm is None or self._warm.step == step else self._warm
        return (self._clock() - begin.time) / max(step - begin.step, 1) * (total - step)

    def _since(self, begin: _Mark, step: int, now: float, waited: float) -> Speed:
        seconds = max(now - begin.time, 1e-9)
        return Speed(
            seconds=seconds,
            images_per_second=(step - begin.step) * self._batch_size / seconds,
            data_wait=min(max(waited - begin.waited, 0.0) / seconds, 1.0),
        )
