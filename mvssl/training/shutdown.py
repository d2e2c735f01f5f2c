"""Stop politely: a signal or the end of the time asks for a stop after the current step; a second SIGINT kills.

What a run does in a job of SLURM: it puts itself into the queue again when it is stopped for the job's end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from mvssl.distributed import World


def requeue(stopped_by: str) -> str | None:
    """Put this job into the queue again if SIGUSR1 stopped the run; says what was done, None if nothing was."""
    job = os.environ.get("SLURM_JOB_ID")
    if stopped_by != "SIGUSR1" or job is None or shutil.which("scontrol") is None:
        return None
    done = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
    if done.returncode:
        return f"SLURM did not take job {job} into the queue again ({done.stderr.strip()}): submit it anew."
    return f"SLURM takes job {job} into the queue again."


EXIT_INTERRUPTED = 75
"""Exit code of a run that saved a checkpoint because of a signal (EX_TEMPFAIL of sysexits.h: run it again)."""

LISTENED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what SLURM sends ahead of a job's end where it is asked to (sbatch --signal=USR1@120)."""

TIME = "The end of --time"
_TIME_CODE = 1000  # beyond all signals


class StopRequest:
    """Context manager; `requested` names what asked for a stop. Outside the main thread no signal is heard.

    Attributes:
        reserve: seconds before the end of the time at which to stop: what saving takes.
    """

    def __init__(self, world: World, *, seconds: float | None = None) -> None:
        """`seconds` is the time from now after which to stop; None for no end."""
        self.requested: str | None = None
        self.reserve = 0.0
        self._world = world
        self._end = None if seconds is None else time.monotonic() + seconds
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in LISTENED:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def agree(self) -> str | None:
        """What asked for a stop on any rank, None if nothing did; every rank has to ask at the same moments."""
        self._look_at_the_time()
        code = 0
        if self.requested:
            code = _TIME_CODE if self.requested == TIME else signal.Signals[self.requested].value
        agreed = int(self._world.max(code))
        if not agreed:
            return None
        return TIME if agreed == _TIME_CODE else signal.Signals(agreed).name

    class Requested(Exception):
        """Raised by `check`: leave what you are doing."""

    def check(self, done: int = 0) -> None:
        """Raise `Requested` if a stop is due; fits where a progress callback is called with what is `done`."""
        self._look_at_the_time()
        if self.requested:
            raise StopRequest.Requested

    def _look_at_the_time(self) -> None:
        if self._end is not None and not self.requested and time.monotonic() + self.reserve >= self._end:
            self.requested = TIME

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
