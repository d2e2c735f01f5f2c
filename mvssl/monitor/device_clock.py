"""The stall clock: the share of the time in which the GPU has nothing to do, inside a step and between two."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.runtime import load_library

logger = logging.getLogger("mvssl")
cuda: Any = torch.cuda  # Any: torch ships its streams without types

_SOURCE = Path(__file__).with_name("device_clock.c")
_BETWEEN, _IN_STEP, _OFF, _CLOSED = range(4)  # as in device_clock.c
# Seconds sampled at a stretch; then the thread looks whether to hold, for which it needs Python's lock. What goes on
# until it gets the lock (5 ms as a rule) is not sampled, so the stretches must be long.
_PIECE = 0.2
_LATENCY = 4e-6  # seconds from a launch until its kernel runs; in a trace of an H100 1.7 us after the call's return
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: no call of this thread spoils what another one captures


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of some time, in [0, 1], in which the GPU had nothing queued.

    Attributes:
        idle_in_step: while a step was being launched.
        idle_between: between two steps.
        samples: how often the GPU was asked.
    """

    idle_in_step: float
    idle_between: float
    samples: int

    @property
    def idle(self) -> float:
        """In a step or between two."""
        return self.idle_in_step + self.idle_between

    def launching(self, wait: float) -> float:
        """The idle share that a host which waited for data for the share `wait` does not explain: it was launching."""
        return self.idle_in_step + max(0.0, self.idle_between - wait)


@dataclass(frozen=True, kw_only=True)
class _Seconds:
    """Seconds counted so far."""

    in_step: float = 0.0
    between: float = 0.0
    busy: float = 0.0
    samples: int = 0

    def since(self, earlier: _Seconds) -> Shares | None:
        """Shares of the time since an earlier reading; None if there is no sample in it."""
        in_step, between = self.in_step - earlier.in_step, self.between - earlier.between
        whole = in_step + between + self.busy - earlier.busy
        if whole <= 0:
            return None
        return Shares(
            idle_in_step=in_step / whole, idle_between=between / whole, samples=self.samples - earlier.samples
        )


class _Record(ctypes.Structure):
    """What the training thread and the sampling thread share; the layout is that of `Record` in device_clock.c."""

    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("phase", ctypes.c_int32),
        ("samples", ctypes.c_int64),
        ("idle", ctypes.c_double * 2),
        ("busy", ctypes.c_double),
    )


class DeviceClock:
    """Asks the GPU all the time whether the stream of the step still has work, and never waits for it.

    A thread of its own does so from the first step until `close`, on CUDA only and where there is a C compiler. Without
    one, and once CUDA has reported an error, nothing is measured and all shares are None.
    """

    def __init__(self, device: torch.device, *, hold: Callable[[], bool] = lambda: False) -> None:
        """Begin nothing yet.

        Args:
            device: where the steps run.
            hold: whether not to measure for now, asked every 0.2 s: a CUDA graph is being captured, on another stream.
        """
        self._device = device
        self._hold = hold
        self._record = _Record(phase=_OFF)
        self._thread: threading.Thread | None = None
        self._failed = False
        self._first: _Seconds | None = None
        self._last = _Seconds()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enter with the batch received, leave behind the step's launches; in the thread that trains."""
        if self._device.type != "cuda":
            yield
            return
        stream = cuda.current_stream(self._device)
        self._record.stream = stream.cuda_stream
        self._record.phase = _IN_STEP
        if self._thread is None:
            name = "mvssl-device-clock"
            self._thread = threading.Thread(target=self._watch, args=(stream.device_index,), name=name, daemon=True)
            self._thread.start()
        yield
        self._record.phase = _BETWEEN

    def interrupt(self) -> None:
        """What comes next (an evaluation, a save) is no time between two steps."""
        self._record.phase = _OFF

    def shares(self) -> Shares | None:
        """Shares of the time since this was last asked, without the interruptions; None without a sample in it."""
        if self._failed:
            return None
        now, last = self._seconds(), self._last
        self._first, self._last = self._first or now, now
        return now.since(last)

    def idle_share(self) -> float | None:
        """The whole idle share that `shares` gives."""
        shares = self.shares()
        return None if shares is None else shares.idle

    def run_shares(self) -> Shares | None:
        """Shares of the time since `shares` was first asked: what came before was start and compilation."""
        return None if self._failed or self._first is None else self._seconds().since(self._first)

    def close(self) -> None:
        """End the thread; what is counted can still be read."""
        self._record.phase = _CLOSED
        if self._thread is not None:
            self._thread.join(timeout=10)  # a GPU that hangs must not keep the run from ending

    def _seconds(self) -> _Seconds:
        """What is counted so far."""
        record = self._record
        in_step, between = record.idle[_IN_STEP], record.idle[_BETWEEN]
        return _Seconds(in_step=in_step, between=between, busy=record.busy, samples=record.samples)

    def _watch(self, device: int) -> None:
        """Sample until the clock is closed or something fails; the body of the thread."""
        try:
            library = load_library(_SOURCE)
            if isinstance(library, str):
                raise OSError(library)
            query, latency = cuda_query(device), ctypes.c_double(_LATENCY)
            while self._record.phase != _CLOSED:
                if self._hold():
                    time.sleep(_PIECE)
                elif error := library.sample(query, ctypes.byref(self._record), latency, ctypes.c_double(_PIECE)):
                    raise OSError(f"CUDA error {error}")
        except (OSError, AttributeError) as error:  # AttributeError: a CUDA runtime without these functions
            self._failed = True
            logger.debug("the GPU's idle share is not measured: %s", error)


def cuda_query(device: int) -> Any:
    """The function cudaStreamQuery of the CUDA runtime that torch has loaded, with the calling thread ready to call it.

    Raises:
        OSError: there is no such library, or CUDA reports an error.
    """
    runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")
    mode = ctypes.c_int(_THREAD_LOCAL)
    # The device first: the other call would make a context on device 0.
    error = runtime.cudaSetDevice(device) or runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    if error:
        raise OSError(f"CUDA error {error}")
    return runtime.cudaStreamQuery
