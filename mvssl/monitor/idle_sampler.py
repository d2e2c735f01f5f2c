"""Samples how much of the time the GPU has nothing queued, within a step and between steps, without synchronising."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.c_library import load_library

logger = logging.getLogger("mvssl")
cuda: Any = torch.cuda  # Any: torch ships its streams without types

_SOURCE = Path(__file__).with_name("idle_sampler.c")
_BETWEEN, _IN_STEP, _OFF, _CLOSED = range(4)  # as in idle_sampler.c
# Seconds per call into C. Between two calls the thread needs the GIL (5 ms as a rule) and does not sample.
_CALL_SECONDS = 0.2
_LATENCY = 4e-6  # seconds from a launch until its kernel runs; in a trace of an H100 1.7 us after the call's return
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: calls of this thread do not invalidate another thread's capture


@dataclass(frozen=True, kw_only=True)
class IdleFractions:
    """Fractions of some training time, in [0, 1], in which the GPU had nothing queued.

    Attributes:
        in_step: while a step was being launched.
        between: between two steps.
        samples: number of samples.
    """

    in_step: float
    between: float
    samples: int

    @property
    def total(self) -> float:
        """In a step or between two."""
        return self.in_step + self.between

    def launching(self, data_wait: float) -> float:
        """The idle fraction that waiting for data for `data_wait` of the time does not explain: launch overhead."""
        return self.in_step + max(0.0, self.between - data_wait)


class _Seconds(NamedTuple):
    """Seconds counted so far."""

    in_step: float = 0.0
    between: float = 0.0
    busy: float = 0.0
    samples: int = 0

    def since(self, earlier: _Seconds) -> IdleFractions | None:
        """Fractions of the time since an earlier reading; None without a sample in it."""
        in_step, between, busy = (self[field] - earlier[field] for field in range(3))
        whole = in_step + between + busy
        if whole <= 0:
            return None
        return IdleFractions(in_step=in_step / whole, between=between / whole, samples=self.samples - earlier.samples)


class _Record(ctypes.Structure):
    """Memory that the training thread and the sampling thread share; same layout as `Record` in idle_sampler.c."""

    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("phase", ctypes.c_int32),
        ("samples", ctypes.c_int64),
        ("idle", ctypes.c_double * 2),
        ("busy", ctypes.c_double),
    )


class IdleSampler:
    """Queries the step's stream from a thread, from the first step until `close`.

    Only on CUDA, and only with a C compiler. Otherwise, and after a CUDA error, all fractions are None. Unlike CUDA
    events around a step, it also sees gaps between the kernels of a step.
    """

    def __init__(self, device: torch.device, *, hold: Callable[[], bool] = lambda: False) -> None:
        """Create a sampler for steps on `device`. While `hold()` is true (a CUDA graph is captured) it pauses."""
        self._device = device
        self._hold = hold
        self._record = _Record(phase=_OFF)
        self._thread: threading.Thread | None = None
        self._failed = False
        self._first: _Seconds | None = None
        self._last = _Seconds()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enter in the training thread with the batch received, leave when the step is launched."""
        if self._device.type != "cuda":
            yield
            return
        stream = cuda.current_stream(self._device)
        self._record.stream = stream.cuda_stream
        self._record.phase = _IN_STEP
        if self._thread is None:
            name = "mvssl-idle-sampler"
            self._thread = threading.Thread(target=self._sample, args=(stream.device_index,), name=name, daemon=True)
            self._thread.start()
        yield
        self._record.phase = _BETWEEN

    def interrupt(self) -> None:
        """Stop counting until the next step: an evaluation or a save follows."""
        self._record.phase = _OFF

    def fractions(self) -> IdleFractions | None:
        """Fractions since the last call of this method, interruptions left out; None without a sample."""
        if self._failed:
            return None
        now, last = self._seconds(), self._last
        self._first, self._last = self._first or now, now
        return now.since(last)

    def run_fractions(self) -> IdleFractions | None:
        """Fractions since the first call of `fractions`; what came before was start-up and compilation."""
        return None if self._failed or self._first is None else self._seconds().since(self._first)

    def close(self) -> None:
        """End the thread; the counts can still be read."""
        self._record.phase = _CLOSED
        if self._thread is not None:
            self._thread.join(timeout=10)  # a GPU that hangs must not keep the run from ending

    def _seconds(self) -> _Seconds:
        record = self._record
        return _Seconds(record.idle[_IN_STEP], record.idle[_BETWEEN], record.busy, record.samples)

    def _sample(self, device: int) -> None:
        """Sample until the sampler is closed or a query fails; the body of the thread."""
        try:
            library = load_library(_SOURCE)
            if isinstance(library, str):
                raise OSError(library)
            query, latency = cuda_query(device), ctypes.c_double(_LATENCY)
            while self._record.phase != _CLOSED:
                if self._hold():
                    time.sleep(_CALL_SECONDS)
                elif error := library.sample(
                    query, ctypes.byref(self._record), latency, ctypes.c_double(_CALL_SECONDS)
                ):
                    raise OSError(f"CUDA error {error}")
        except (OSError, AttributeError) as error:  # AttributeError: a CUDA runtime without these functions
            self._failed = True
            logger.debug("GPU idle time is not measured: %s", error)


def cuda_query(device: int) -> Any:
    """cudaStreamQuery of the CUDA runtime that torch has loaded, with the calling thread set up for it.

    Raises:
        OSError: there is no such library, or CUDA reports an error.
    """
    runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")
    mode = ctypes.c_int(_THREAD_LOCAL)
    # The device first: the other call would create a context on device 0.
    error = runtime.cudaSetDevice(device) or runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    if error:
        raise OSError(f"CUDA error {error}")
    return runtime.cudaStreamQuery
