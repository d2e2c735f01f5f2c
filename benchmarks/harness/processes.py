"""Implementations in processes of their own, each with its own memory, threads and caches, and their peak memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback as tracebacks
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.runtime import InputError

Trials = Mapping[str, Callable[[], dict[str, Any]]]
"""A function for each implementation by name: it runs one trial and reports plain values."""

Build = Callable[[], AbstractContextManager[Trials]]
"""Builds implementations in their process. It is pickled on its way there: a partial of a module's function."""

_GRACE = 20  # seconds that a process may take to end
_KIB_PER_MIB = 1024


class ImplementationFailed(Exception):
    """An implementation raised or its process ended; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a tree of processes, in MiB. Mapped files (FFCV's) count as far as they have been read.

    Attributes:
        rss: sum of the resident sets; a page that several processes share (after a fork) counts in each.
        pss: the same with every shared page divided among its users: what the tree really takes.
        processes: how many there are.
    """

    rss: float = 0.0
    pss: float = 0.0
    processes: int = 0

    def __or__(self, other: Memory) -> Memory:
        """The larger of each value."""
        return Memory(
            rss=max(self.rss, other.rss),
            pss=max(self.pss, other.pss),
            processes=max(self.processes, other.processes),
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial.

    Attributes:
        report: what the implementation reports: "images" and "seconds" where images are counted, and more.
        memory: peak of its process and their descendants meanwhile.
    """

    report: dict[str, Any]
    memory: Memory = field(default_factory=Memory)


class Isolated:
    """Implementations in a process of their own, a context manager; they idle until a trial is asked for.

    Attributes:
        names: of the implementations, once they are `built`.
    """

    def __init__(self, name: str, build: Build) -> None:
        """Start the process, which builds its implementations meanwhile."""
        self._name = name
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads' locks and CUDA's state
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, theirs), name=name)
        self._process.start()
        theirs.close()
        self.names: tuple[str, ...] = ()

    def __enter__(self) -> Isolated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(_GRACE)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def built(self) -> None:
        """Wait until the implementations are built.

        Raises:
            InputError: they cannot run here; the message says why.
            ImplementationFailed: building them failed otherwise.
        """
        self.names = self._receive()

    def trial(self, name: str) -> Trial:
        """Run one trial and wait for its end; raises as `built` does."""
        with PeakMemory(self._process.pid or 0) as memory:
            with contextlib.suppress(OSError):  # its process has ended, which the next line reports
                self._pipe.send(name)
            report: dict[str, Any] = self._receive()
        return Trial(report=report, memory=memory.peak)

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_GRACE)
            raise ImplementationFailed(
                f"the process of {self._name} ended with exit code {self._process.exitcode}"
            ) from None
        if kind == "input error":
            raise InputError(value)
        if kind == "error":
            raise ImplementationFailed(value)
        return value


def _serve(build: Build, pipe: Connection) -> None:
    """In the implementations' process: build them, then run trials until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the benchmark, which closes the pipe
    with contextlib.suppress(EOFError, BrokenPipeError), contextlib.ExitStack() as stack:  # the benchmark has ended
        kind, trials = _attempt(lambda: stack.enter_context(build()))
        if kind != "done":
            pipe.send((kind, trials))
            return
        pipe.send((kind, tuple(trials)))
        while True:
            pipe.send(_attempt(trials[pipe.recv()]))


def _attempt(work: Callable[[], Any]) -> tuple[str, Any]:
    """("done", result), or the kind of error and its message."""
    try:
        return "done", work()
    except (InputError, ImportError) as error:
        return "input error", str(error)
    except Exception as error:
        tracebacks.print_exc()
        return "error", f"{type(error).__name__}: {error}"


class PeakMemory:
    """Samples the memory of a tree of processes in a thread, a context manager (Linux).

    Attributes:
        peak: the largest of each value so far.
    """

    def __init__(self, root: int, *, every: float = 0.2) -> None:
        """Watch process `root` and its descendants, every so many seconds."""
        self.peak = Memory()
        self._root = root
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak |= memory_of(self._root)
            if self._stop.wait(self._every):
                return


def memory_of(root: int) -> Memory:
    """Memory of process `root` and its descendants now; zeros where there is no /proc."""
    pids = _tree(root)
    sums = [_rollup(pid) for pid in pids]
    rss, pss = (sum(each.get(name, 0) for each in sums) / _KIB_PER_MIB for name in ("Rss", "Pss"))
    return Memory(rss=rss, pss=pss, processes=len(pids))


def cpu_seconds() -> float:
    """CPU time of this process and all its descendants so far, in seconds, user and system (Linux: in steps of 10 ms).

    Only this process's own is counted where there is no /proc.
    """
    own = time.process_time()  # finer than /proc
    others = [pid for pid in _tree(os.getpid()) if pid != os.getpid()]
    return own + sum(map(_ticks, others)) / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> int:
    """Clock ticks that a process, and its children that have ended, used."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0
    return sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime


def _tree(root: int) -> list[int]:
    """Process `root` and all its descendants."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit():
            try:
                status = Path("/proc", name, "stat").read_text()
            except OSError:  # it has ended
                continue
            parent = int(status.rpartition(")")[2].split()[1])  # the name before may hold spaces and parentheses
            children.setdefault(parent, []).append(int(name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _rollup(pid: int) -> dict[str, int]:
    """The sums of /proc/PID/smaps_rollup in KiB by name; {} for a process that has ended."""
    try:
        lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
