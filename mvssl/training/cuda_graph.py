"""The whole step as one CUDA graph: recorded once, then replayed by a single launch.

Launched one by one, the thousands of kernels of a step keep the host busier than the device, and the loader's thread
competes with the launches for the GIL. A replay needs neither.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pipelines.runtime import InputError

logger = logging.getLogger("mvssl")

WARM_UP = 3
"""Steps before the recording, in which kernels are compiled and chosen and optimisers make their state. Real steps."""
WARM_UP_RANKS = 11
"""The same with DistributedDataParallel (torch's notes on CUDA graphs: at least 11)."""
_EMPTY = r".*CUDA Graph is empty"
_ECHO = "previous error during capture"


def wants_capture(asked: Literal["auto", "on", "off"], device: torch.device, *, ranks: int) -> bool:
    """Whether to record steps; auto does on CUDA in a run of one process.

    Raises:
        InputError: it is asked for where there is no CUDA device.
    """
    if asked == "on" and device.type != "cuda":
        raise InputError(
            f"cuda_graph is 'on' but must be auto or off on a {device.type} device, which has no CUDA graphs: set it "
            "to auto, or train on a GPU."
        )
    return device.type == "cuda" and (asked == "on" or (asked == "auto" and ranks == 1))


@contextmanager
def in_stream(stream: Any) -> Iterator[None]:
    """Launch into another stream, after all that the current one has and before all that it gets later."""
    if stream is None:
        yield
        return
    current: Any = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class Graph(Protocol):
    """Records operations and repeats them."""

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Record what `work` launches, without running it; its results, which a replay fills."""

    def replay(self) -> None:
        """Run what was recorded."""


class CaptureFailed(RuntimeError):
    """A recording failed and left the process unable to go on; the message says why."""


class CudaGraph:
    """`Graph` on CUDA. Its memory is its own: activations of a step stay reserved between replays."""

    def __init__(self, stream: Any) -> None:
        """`stream` is where to record, on the step's device; recordings cannot be made in a default stream."""
        self._graph: Any = torch.cuda.CUDAGraph()
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = stream

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Record what `work` launches; threads of the loader go on launching and allocating meanwhile.

        An exception is the one that `work` raised, not what CUDA makes of it when the recording is closed.

        Raises:
            CaptureFailed: `work` ran instead of being recorded, or CUDA cannot be used after its failure.
        """
        gc.collect()  # what cycles still hold of the steps before would be missing in the graph's own memory
        raised: list[BaseException] = []
        try:
            # torch's own exit leaves its stream the current one where closing the recording fails.
            with torch.cuda.stream(self._stream), _empty_is_an_error(), self._capture(self._graph, pool=self._pool):
                try:
                    return work()
                except BaseException as error:
                    raised.append(error)
                    raise
        except CaptureFailed:
            raise
        except BaseException as error:
            raised.append(error)
        if isinstance(raised[0], Exception):
            self._recover(raised[0])
        raise raised[0]

    def replay(self) -> None:
        """Run what was recorded, in the current stream."""
        self._graph.replay()

    def _capture(self, graph: Any, **options: Any) -> AbstractContextManager[None]:
        cuda: Any = torch.cuda
        capture: AbstractContextManager[None] = cuda.graph(
            graph, stream=self._stream, capture_error_mode="thread_local", **options
        )
        return capture

    def _recover(self, cause: Exception) -> None:
        """Undo what torch leaves behind a recording that CUDA broke.

        Up to torch 2.12 the allocator goes on as if recording: memory that another stream used is not reused, and that
        of the recording stays reserved. The random generator refuses to draw.

        Raises:
            CaptureFailed: it cannot be undone.
        """
        _BROKEN.append(self._graph)
        device, pool = self._stream.device, self._pool
        try:
            self._graph.reset()
            with contextlib.suppress(RuntimeError):  # it is closed already
                torch._C._cuda_endAllocateToPool(device.index, pool)
            # The first answer may come from a new pool of that name.
            if not _is_released(device.index, pool) and not _is_released(device.index, pool):
                torch._C._cuda_releasePool(device.index, pool)
            with torch.cuda.stream(self._stream):
                with contextlib.suppress(RuntimeError):  # an error that nobody has read yet
                    torch.zeros(1, device=device)
                with self._capture(torch.cuda.CUDAGraph()):  # one that succeeds frees the generator
                    torch.zeros(1, device=device)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            if not isinstance(cause, torch.OutOfMemoryError):
                raise
        except Exception as error:
            raise CaptureFailed(f"{describe(cause)}; CUDA cannot be used afterwards: {describe(error)}") from cause


_BROKEN: list[Any] = []
"""Graphs whose recording failed: torch's allocator of pinned memory may go on to ask them, so they must stay alive."""


def _is_released(device: int, pool: Any) -> bool:
    """Whether nothing holds an allocator's pool; torch raises where one that is released gets a user again."""
    try:
        torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool)
    except RuntimeError:
        return True
    torch._C._cuda_endAllocateToPool(device, pool)
    torch._C._cuda_releasePool(device, pool)
    return False


@contextmanager
def _empty_is_an_error() -> Iterator[None]:
    """Turn torch's warning about an empty graph into an error: the step ran, and replays would do nothing.

    Raises:
        CaptureFailed: nothing was recorded.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=_EMPTY)
        yield
    for warning in caught:
        if re.match(_EMPTY, str(warning.message)):
            raise CaptureFailed("the step launched nothing in the stream that was recorded")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def describe(error: BaseException) -> str:
    """What broke a recording, in one line: the error's first line, and where in the user's code it was raised.

    CUDA answers every later call with an echo of the first error; the echoes are left out.
    """
    while _ECHO in str(error) and error.__context__ is not None:
        error = error.__context__
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    frames = [frame for frame in extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in frame.filename]
    place = f" (in {frames[-1].name}, {Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {words}{place}"


class StepGraph:
    """Calls a step's operations: one by one at first, recorded after a few steps, replayed from then on.

    Attributes:
        inputs: where the next step's stacks belong, once they have a fixed place.
        capturing: whether a recording is going on.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
        forget: Callable[[], None],
        *,
        wanted: bool,
        graph: Callable[[], Graph],
        asked: bool = False,
        warm_up: int = WARM_UP,
        stream: Any = None,
    ) -> None:
        """Nothing is run or recorded yet.

        Args:
            work: a whole step, from stacks on the device to its results there; reads nothing back.
            forget: clears what a failed recording of `work` left behind.
            wanted: whether to record at all.
            graph: makes what records.
            asked: whether the user insists: then a failure to record is an error.
            warm_up: steps run one by one before the recording.
            stream: where all steps run, also the recording and its replays; None is the current one.
        """
        self._work = work
        self._forget = forget
        self._wanted = wanted
        self._asked = asked
        self._warm_up = warm_up
        self._stream = stream
        self._make = graph
        self._done = 0
        self._graph: Graph | None = None
        self._outputs: tuple[Tensor, ...] = ()
        self.inputs: list[Tensor] | None = None
        self.capturing = False

    @property
    def captured(self) -> bool:
        """Whether steps are replays."""
        return self._graph is not None

    @property
    def warm_up(self) -> int:
        """Steps after which all are alike: the first one compiles, and if a graph is wanted a later one records it."""
        return self._warm_up + 1 if self._wanted else 1

    def __call__(self, stacks: list[Tensor]) -> tuple[Tensor, ...]:
        """Run one step.

        Args:
            stacks: the step's input; `inputs` themselves, filled, where those are set.

        Returns:
            Its results, which later steps leave alone.

        Raises:
            InputError: it cannot be recorded though the user asked for it, or CUDA cannot be used after the attempt.
            torch.OutOfMemoryError: the device's memory is full.
        """
        if self._graph is None and self._wanted and self._done >= self._warm_up:
            self._record(stacks)
        with in_stream(self._stream):
            if self._graph is None:
                self._done += 1
                return self._work(stacks)
            self._graph.replay()
            return tuple(output.clone() for output in self._outputs)

    def _record(self, stacks: list[Tensor]) -> None:
        """Record with these stacks as the input from now on; without success never try again."""
        # What is a view's own tensor belongs to the loader, which frees it.
        inputs = [stack.clone() for stack in stacks]
        graph = self._make()
        self.capturing = True
        try:
            with in_stream(self._stream):
                self._outputs = graph.record(lambda: self._work(inputs))
        except torch.OutOfMemoryError:
            raise
        except CaptureFailed as error:
            raise InputError(
                f"cuda_graph is {'on' if self._asked else 'auto'!r} but must be 'off' for this step, which cannot be "
                f"recorded ({error}): start again with --cuda-graph off."
            ) from error
        except Exception as error:
            reason = describe(error)
            self._forget()
            self._wanted = False
            if self._asked:
                raise InputError(
                    f"cuda_graph is 'on' but must be 'auto' or 'off' for this step, which cannot be recorded "
                    f"({reason}): set it to auto or off."
                ) from error
            logger.warning(
                "The step could NOT be recorded as a CUDA graph and is launched kernel by kernel, which may be slower: "
                "%s. Set --cuda-graph off to train so on purpose.",
                reason,
            )
        else:
            self._graph, self.inputs = graph, inputs
            logger.info("the step is one CUDA graph from here on")
        finally:
            self.capturing = False
        gc.collect()  # a traceback holds what a recording that failed has allocated

    def drop(self) -> None:
        """Forget the recording; the next steps warm up for another one."""
        self._graph, self._outputs, self.inputs, self._done = None, (), None, 0
