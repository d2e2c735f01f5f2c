"""Stop politely: the first SIGINT or SIGTERM asks for a stop after the current step, the second SIGINT kills."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from mvssl.distributed import World

EXIT_INTERRUPTED = 75
"""Exit code of a run that saved a checkpoint because of a signal (EX_TEMPFAIL of sysexits.h: run it again)."""


class StopRequest:
    """Context manager; `requested` names the signal once one came. Outside the main thread it listens to nothing."""

    def __init__(self, world: World) -> None:
        self.requested: str | None = None
        self._world = world
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def agree(self) -> str | None:
        """Name of the signal that came on any rank, None if none did; every rank has to ask at the same moments."""
        number = signal.Signals[self.requested].value if self.requested else 0
        agreed = int(self._world.max(number))
        return signal.Signals(agreed).name if agreed else None

    class Requested(Exception):
        """Raised by `check`: leave what you are doing."""

    def check(self, done: int = 0) -> None:
        """Raise `Requested` if a signal came; fits where a progress callback is called with what is `done`."""
        if self.requested:
            raise StopRequest.Requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
