"""Stops a run cleanly on a signal or at the end of --time, and requeues its SLURM job."""

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

EXIT_INTERRUPTED = 75
"""Exit code of a run that saved a checkpoint and stopped on request (EX_TEMPFAIL of sysexits.h: run it again)."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""SIGHUP: the terminal was closed. SLURM sends SIGUSR1 ahead of a job's end if asked to (sbatch --signal=USR1@120)."""

TIME = "The end of --time"
CALLBACK = "A callback"
COLLAPSE = "collapse"
_CODES = {TIME: 1000, CALLBACK: 1001, COLLAPSE: 1002}  # above all signal numbers


class Interrupted(Exception):
    """A run was asked to stop. Its state is saved; `--resume` continues it.

    Attributes:
        stopped_by: name of the signal, or `TIME`.
    """

    def __init__(self, message: str, stopped_by: str) -> None:
        super().__init__(message)
        self.stopped_by = stopped_by


class StopRequest:
    """Context manager that notes a signal or the end of the time; a second SIGINT kills.

    Outside the main thread no signals are caught.

    Attributes:
        requested: name of the signal, `TIME`, `CALLBACK` or `COLLAPSE`; None if nothing asked for a stop.
        reserve: seconds before the end of the time at which to stop, for saving.
    """

    class Requested(Exception):
        """Raised by `check`: abandon the current work."""

    def __init__(self, world: World, *, seconds: float | None = None) -> None:
        """`seconds` is the time from now until the stop; None for no limit."""
        self.requested: str | None = None
        self.reserve = 0.0
        self._world = world
        self._end = None if seconds is None else time.monotonic() + seconds
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agree(self) -> str | None:
        """The stop request of any rank, None if there is none. Collective: all ranks call it at the same points."""
        self._check_time()
        code = 0
        if self.requested:
            code = _CODES.get(self.requested) or signal.Signals[self.requested].value
        agreed = int(self._world.max(code))
        if not agreed:
            return None
        return next((name for name, code in _CODES.items() if code == agreed), None) or signal.Signals(agreed).name

    def check(self, done: int = 0) -> None:
        """Raise `Requested` if a stop is due. `done` is ignored, so that this can serve as a progress callback."""
        self._check_time()
        if self.requested:
            raise StopRequest.Requested

    def _check_time(self) -> None:
        if self._end is not None and not self.requested and time.monotonic() + self.reserve >= self._end:
            self.requested = TIME

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)


def requeue(stopped_by: str) -> str | None:
    """Requeue this SLURM job if SIGUSR1 stopped the run; a message for the user, None if nothing was done."""
    job = os.environ.get("SLURM_JOB_ID")
    if stopped_by != "SIGUSR1" or job is None or shutil.which("scontrol") is None:
        return None
    done = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
    if done.returncode:
        return f"SLURM did not requeue job {job} ({done.stderr.strip()}): submit it again."
    return f"SLURM requeued job {job}."
