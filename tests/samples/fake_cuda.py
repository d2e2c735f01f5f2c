"""What recordings call of torch.cuda, on the CPU: streams, graphs, the allocator's pools and the random generator."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

ECHO = "CUDA error: operation failed due to a previous error during capture"


class FakeStream:
    """Knows its device and for which streams it waited."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


@dataclass
class FakeGraph:
    """A graph of `FakeCuda`."""

    cuda: FakeCuda
    replayed_in: list[FakeStream] = field(default_factory=list)
    was_reset: bool = False

    def replay(self) -> None:
        self.replayed_in.append(self.cuda.current)

    def reset(self) -> None:
        self.was_reset = True
        if self.cuda.reset_releases:
            self.cuda.release(1, self.cuda.pool)
        if self.cuda.forgets:
            del self.cuda.users[self.cuda.pool]


class FakeCuda:
    """torch's state around a recording. What a broken one leaves behind depends on torch's version.

    Attributes:
        end_closes: whether the allocator's recording is closed although CUDA reports an error (torch > 2.12.0).
        reset_releases: whether the graph's reset gives the pool back (later still).
        forgets: whether the allocator has then already forgotten the pool, as it does where memory is scarce.
        broken: whether CUDA has broken the recording that goes on.
        dead: whether CUDA breaks all further recordings.
        empty: whether recordings record nothing.
        current: the current stream.
        recorded_in: the streams of the recordings.
        users: of each pool that there is.
        underway: pools that allocations go to.
        generator_captures: whether the random generator believes that a recording goes on.
    """

    pool = (0, 7)

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, end_closes: bool, reset_releases: bool, forgets: bool = False
    ) -> None:
        self.end_closes, self.reset_releases, self.forgets = end_closes, reset_releases, forgets
        self.broken = self.dead = self.empty = self.generator_captures = False
        self.stream = FakeStream(torch.device("cuda", 1))
        self.default = self.current = FakeStream(torch.device("cuda", 1))
        self.recorded_in: list[FakeStream] = []
        self.users: dict[Any, int] = {}
        self.underway: list[Any] = []
        self.graphs: list[FakeGraph] = []
        for name, value in {
            "CUDAGraph": self._graph,
            "graph_pool_handle": lambda: self.pool,
            "stream": self._use,
            "graph": self._record,
            "current_stream": lambda device=None: self.current,
            "synchronize": lambda device=None: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool", self.begin)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release)
        zeros = torch.zeros

        def on_cpu(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
            return zeros(*size, device="cpu" if device == self.stream.device else device, **options)

        monkeypatch.setattr(torch, "zeros", on_cpu)

    def begin(self, device: int, pool: Any) -> None:
        """As torch: a pool that was given back gets no user again."""
        if self.users.get(pool, 1) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.users[pool] = self.users.get(pool, 0) + 1
        self.underway.append(pool)

    def end(self, device: int, pool: Any) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device: int, pool: Any) -> None:
        self.users[pool] -= 1
        if self.users[pool] < 0:
            raise AssertionError("torch would abort")

    def sync(self) -> None:
        """What `.item()` does in a recording."""
        self.broken = True
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def _graph(self) -> FakeGraph:
        self.graphs.append(FakeGraph(self))
        return self.graphs[-1]

    @contextmanager
    def _use(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def _record(
        self, graph: FakeGraph, *, stream: FakeStream, capture_error_mode: str, pool: Any = (1, 0)
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        before, self.current = self.current, stream
        self.recorded_in.append(stream)
        self.begin(1, pool)
        self.generator_captures, self.broken = True, self.dead
        try:
            yield
        finally:
            if self.broken:
                if self.end_closes:
                    self.end(1, pool)
                raise RuntimeError(ECHO)  # and the stream stays the current one
            self.end(1, pool)
            self.generator_captures = False
            if self.empty:
                warnings.warn("The CUDA Graph is empty. This usually means that ...", UserWarning, stacklevel=1)
            self.current = before
