"""A device for tests of the stall clock: it works in real time, answers as a stream does, and keeps an account."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from mvssl.monitor import device_clock
from mvssl.monitor.device_clock import DeviceClock, Shares
from pipelines.runtime import load_library

LIBRARY = load_library(Path(__file__).with_name("fake_device.c"))
needs_compiler = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"nothing to build the clock with: {LIBRARY}")


class _State(ctypes.Structure):
    _fields_ = (
        ("latency", ctypes.c_double),
        ("empty", ctypes.c_double),
        ("idle", ctypes.c_double),
        ("error", ctypes.c_int),
    )


class FakeDevice:
    """Work that is launched is done one after the other.

    Attributes:
        in_step, between: seconds in which it was idle in the steps and between them, as the clock should find.
        whole: seconds of the steps and between them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, latency: float = 0.0) -> None:
        """Take CUDA's place for clocks that are made; `latency` seconds pass from a launch until the work begins."""
        assert not isinstance(LIBRARY, str)
        self._state = _State(latency=latency, empty=time.monotonic())
        self._calls = LIBRARY
        self._locked = ctypes.PyDLL(LIBRARY._name)  # calls through it keep Python's lock
        for library in (self._calls, self._locked):
            library.idle.restype = ctypes.c_double
        self.in_step = self.between = self.whole = 0.0
        self._mark: tuple[float, float] | None = None
        stream = SimpleNamespace(cuda_stream=ctypes.addressof(self._state), device_index=0)
        monkeypatch.setattr(device_clock.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(device_clock, "cuda_query", lambda index: self._calls.query)
        monkeypatch.setattr(device_clock, "_LATENCY", latency)

    def launch(self, seconds: float) -> None:
        """Put work of this length behind what there is; the host goes on at once. Drops Python's lock."""
        self._calls.launch(ctypes.byref(self._state), ctypes.c_double(seconds))

    def host_works(self, seconds: float) -> None:
        """Let the host work and keep Python's lock."""
        self._locked.work(ctypes.c_double(seconds))

    def fail(self, error: int) -> None:
        """Answer queries with an error from now on."""
        self._state.error = error

    @contextmanager
    def step(self, clock: DeviceClock) -> Iterator[None]:
        """A step under the clock, and in the account."""
        with clock.step():
            self._account("between")
            yield
            self._account("in_step")

    def truth(self) -> Shares:
        """The account of all steps and of the time between them."""
        return Shares(idle_in_step=self.in_step / self.whole, idle_between=self.between / self.whole, samples=0)

    def _account(self, what: str) -> None:
        now, idle = time.monotonic(), float(self._locked.idle(ctypes.byref(self._state)))
        if self._mark is not None:
            setattr(self, what, getattr(self, what) + idle - self._mark[1])
            self.whole += now - self._mark[0]
        self._mark = now, idle
