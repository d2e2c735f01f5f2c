"""A fake device for tests of the idle sampler: it works in real time, answers queries, and counts its idle time."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from mvssl.monitor import idle_sampler
from mvssl.monitor.idle_sampler import IdleFractions, IdleSampler
from pipelines.c_library import load_library

LIBRARY = load_library(Path(__file__).with_name("fake_device.c"))
needs_compiler = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no compiler: {LIBRARY}")


class _State(ctypes.Structure):
    _fields_ = (
        ("latency", ctypes.c_double),
        ("empty", ctypes.c_double),
        ("idle", ctypes.c_double),
        ("error", ctypes.c_int),
    )


class FakeDevice:
    """Does what is launched one after the other.

    Attributes:
        in_step, between: idle seconds within steps and between them.
        whole: seconds in all.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, latency: float = 0.0) -> None:
        """Replace CUDA for new samplers; work begins `latency` seconds after its launch."""
        assert not isinstance(LIBRARY, str)
        self._state = _State(latency=latency, empty=time.monotonic())
        self._calls = LIBRARY
        self._locked = ctypes.PyDLL(LIBRARY._name)  # calls through it hold the GIL
        for library in (self._calls, self._locked):
            library.idle.restype = ctypes.c_double
        self.in_step = self.between = self.whole = 0.0
        self._mark: tuple[float, float] | None = None
        stream = SimpleNamespace(cuda_stream=ctypes.addressof(self._state), device_index=0)
        monkeypatch.setattr(idle_sampler.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(idle_sampler, "cuda_query", lambda index: self._calls.query)
        monkeypatch.setattr(idle_sampler, "_LATENCY", latency)

    def launch(self, seconds: float) -> None:
        """Queue work of this length without waiting for it; releases the GIL."""
        self._calls.launch(ctypes.byref(self._state), ctypes.c_double(seconds))

    def host_works(self, seconds: float) -> None:
        """Let the host work while it holds the GIL."""
        self._locked.work(ctypes.c_double(seconds))

    def fail(self, error: int) -> None:
        """Answer queries with an error from now on."""
        self._state.error = error

    @contextmanager
    def step(self, sampler: IdleSampler) -> Iterator[None]:
        """A step, sampled and counted."""
        with sampler.step():
            self._account("between")
            yield
            self._account("in_step")

    def truth(self) -> IdleFractions:
        """The exact fractions."""
        return IdleFractions(in_step=self.in_step / self.whole, between=self.between / self.whole, samples=0)

    def _account(self, what: str) -> None:
        now, idle = time.monotonic(), float(self._locked.idle(ctypes.byref(self._state)))
        if self._mark is not None:
            setattr(self, what, getattr(self, what) + idle - self._mark[1])
            self.whole += now - self._mark[0]
        self._mark = now, idle
