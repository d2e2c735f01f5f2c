"""Contenders in processes of their own: each has its own memory, threads and caches, and rests while others work."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback as tracebacks
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from benchmarks.measuring.process_memory import Memory, PeakMemory
from pipelines.runtime import InputError

Turns = Mapping[str, Callable[[], dict[str, Any]]]
"""A function for each contender by name: it takes one turn and reports plain values."""

Build = Callable[[], AbstractContextManager[Turns]]
"""Makes contenders in their process. It is pickled on its way there: a partial of a module's function."""

_GRACE = 20  # seconds that a process may take to end


class ContenderFailed(Exception):
    """A contender raised or its process ended; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn.

    Attributes:
        report: what the contender said.
        memory: peak of its process and their descendants during the turn.
    """

    report: dict[str, Any]
    memory: Memory


class Isolated:
    """Contenders in a process of their own, a context manager. Their turns are taken one at a time, when asked for.

    Attributes:
        contenders: names of the turns that can be taken, once they are `built`.
    """

    def __init__(self, name: str, build: Build) -> None:
        """Start the process, which builds its contenders meanwhile."""
        self._name = name
        context = multiprocessing.get_context("spawn")  # a fork would take over threads' locks and CUDA's state
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, theirs), name=name)
        self._process.start()
        theirs.close()
        self.contenders: tuple[str, ...] = ()

    def __enter__(self) -> Isolated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def built(self) -> None:
        """Wait until the contenders are built.

        Raises:
            InputError: they cannot be built here; the message says why.
            ContenderFailed: building them failed otherwise.
        """
        self.contenders = self._receive()

    def turn(self, contender: str) -> Turn:
        """Let this contender take its turn and wait for its end.

        Raises:
            InputError: it cannot be taken; the message says why.
            ContenderFailed: it failed otherwise.
        """
        with PeakMemory(self._process.pid or 0) as memory:
            with contextlib.suppress(OSError):  # its process has ended, which the next line says
                self._pipe.send(contender)
            report: dict[str, Any] = self._receive()
        return Turn(report=report, memory=memory.peak)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(_GRACE)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_GRACE)
            raise ContenderFailed(
                f"the process of {self._name} ended with exit code {self._process.exitcode}"
            ) from None
        if kind == "input error":
            raise InputError(value)
        if kind == "error":
            raise ContenderFailed(value)
        return value


def _serve(build: Build, pipe: Connection) -> None:
    """In the contenders' process: build them, then take turns until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the benchmark, which closes the pipe
    with contextlib.suppress(EOFError, BrokenPipeError), contextlib.ExitStack() as stack:  # the benchmark has ended
        kind, turns = _attempt(lambda: stack.enter_context(build()))
        if kind != "done":
            pipe.send((kind, turns))
            return
        pipe.send((kind, tuple(turns)))
        while True:
            pipe.send(_attempt(turns[pipe.recv()]))


def _attempt(work: Callable[[], Any]) -> tuple[str, Any]:
    """What came of some work: ("done", its result) or the kind of error and its message."""
    try:
        return "done", work()
    except (InputError, ImportError) as error:
        return "input error", str(error)
    except Exception as error:
        tracebacks.print_exc()
        return "error", f"{type(error).__name__}: {error}"
