"""Records the whole step as one CUDA graph and replays it with a single launch.

Launching thousands of kernels one by one keeps the host busier than the device, and competes with the loader's threads
for the GIL.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import time
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
"""Ordinary steps before the recording: kernels are compiled and tuned, the optimiser allocates its state."""
WARM_UP_RANKS = 11
"""The same with DistributedDataParallel (torch's notes on CUDA graphs: at least 11)."""
_EMPTY = r".*CUDA Graph is empty"
_ECHO = "previous error during capture"


def wants_capture(
    asked: Literal["auto", "on", "off"], device: torch.device, *, ranks: int, restores_random: bool = False
) -> bool:
    """Whether to record steps; auto records on CUDA in runs of one process.

    Args:
        asked: the option.
        device: of the step.
        ranks: of the run.
        restores_random: whether the backward restores random generators, which a recording cannot hold.

    Raises:
        InputError: a graph is requested without a CUDA device, or where it cannot be recorded.
    """
    if asked == "on" and device.type != "cuda":
        raise InputError(
            f"cuda_graph is 'on' but must be auto or off on a {device.type} device, which has no CUDA graphs: set it "
            "to auto, or train on a GPU."
        )
    if asked == "on" and restores_random:
        raise InputError(
            "cuda_graph is 'on' but must be auto or off with checkpointing and stochastic depth or dropout, whose "
            "random numbers are restored from the host: leave --cuda-graph out, or leave --checkpointing out.",
            field="RunOptions.cuda_graph",
        )
    return device.type == "cuda" and (asked == "on" or (asked == "auto" and ranks == 1 and not restores_random))


@contextmanager
def in_stream(stream: Any) -> Iterator[None]:
    """Launch into `stream`, ordered after earlier and before later work of the current stream."""
    if stream is None:
        yield
        return
    current: Any = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class Graph(Protocol):
    """Records operations and replays them."""

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Record what `work` launches without running it; returns its results, which a replay fills."""

    def replay(self) -> None:
        """Run what was recorded."""


class CaptureFailed(RuntimeError):
    """A recording failed and left CUDA unusable in this process."""


class CudaGraph:
    """`Graph` on CUDA, with a memory pool of its own: activations stay reserved between replays."""

    def __init__(self, stream: Any) -> None:
        """`stream`: where to record, on the step's device; must not be a default stream."""
        self._graph: Any = torch.cuda.CUDAGraph()
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = stream

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Record what `work` launches, while loader threads may go on launching and allocating.

        Exceptions are those of `work`, not what CUDA turns them into when the recording is closed.

        Raises:
            CaptureFailed: `work` ran instead of being recorded, or CUDA is unusable after its failure.
        """
        gc.collect()  # memory held by reference cycles of earlier steps is not available to the graph's pool
        raised: list[BaseException] = []
        try:
            # If closing the recording fails, torch leaves the recording's stream as the current one.
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
        """Clean up after a recording that CUDA broke.

        Up to torch 2.12 the allocator behaves as if still recording: memory used by other streams is not reused, the
        recording's memory stays reserved, and the random generator raises.

        Raises:
            CaptureFailed: that is not possible.
        """
        _BROKEN.append(self._graph)
        device, pool = self._stream.device, self._pool
        try:
            self._graph.reset()
            with contextlib.suppress(RuntimeError):  # already closed
                torch._C._cuda_endAllocateToPool(device.index, pool)
            # The first answer may be about a new pool of that name.
            if not _is_released(device.index, pool) and not _is_released(device.index, pool):
                torch._C._cuda_releasePool(device.index, pool)
            with torch.cuda.stream(self._stream):
                with contextlib.suppress(RuntimeError):  # a pending error
                    torch.zeros(1, device=device)
                with self._capture(torch.cuda.CUDAGraph()):  # a successful recording frees the generator
                    torch.zeros(1, device=device)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            if not isinstance(cause, torch.OutOfMemoryError):
                raise
        except Exception as error:
            raise CaptureFailed(f"{describe(cause)}; CUDA cannot be used afterwards: {describe(error)}") from cause


_BROKEN: list[Any] = []
"""Graphs whose recording failed; they stay alive because torch's pinned-memory allocator may still query them."""


def _is_released(device: int, pool: Any) -> bool:
    """Whether an allocator's pool is released: torch raises if a released one is used again."""
    try:
        torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool)
    except RuntimeError:
        return True
    torch._C._cuda_endAllocateToPool(device, pool)
    torch._C._cuda_releasePool(device, pool)
    return False


@contextmanager
def _empty_is_an_error() -> Iterator[None]:
    """Raise CaptureFailed where torch warns about an empty graph: the step ran, and replays would do nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=_EMPTY)
        yield
    for warning in caught:
        if re.match(_EMPTY, str(warning.message)):
            raise CaptureFailed("the step launched nothing in the stream that was recorded")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def describe(error: BaseException) -> str:
    """Why a recording failed, in one line: the first line of the error, and where outside of torch it was raised.

    CUDA repeats the first error in every later call; the repetitions are skipped.
    """
    while _ECHO in str(error) and error.__context__ is not None:
        error = error.__context__
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    frames = [frame for frame in extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in frame.filename]
    place = f" (in {frames[-1].name}, {Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {words}{place}"


class StepGraph:
    """Wraps a step: runs it kernel by kernel at first, records it after the warm-up, then replays the graph.

    Attributes:
        inputs: static input tensors that the next step's stacks must be written to, once there is a graph.
        capturing: whether a recording is in progress.
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
        """Wrap a step.

        Args:
            work: the step, from stacks on the device to results there, without a host sync.
            forget: cleans up after a failed recording of `work`.
            wanted: whether to record at all.
            graph: creates the recorder.
            asked: whether the user requested a graph: a failed recording is then an error.
            warm_up: ordinary steps before the recording.
            stream: where steps, recording and replays run; None for the current one.
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
        """Number of first steps that compile or record; later ones are all alike."""
        return self._warm_up + 1 if self._wanted else 1

    def __call__(self, stacks: list[Tensor]) -> tuple[Tensor, ...]:
        """Run one step.

        Args:
            stacks: the step's input; must be `inputs` themselves if those are set.

        Returns:
            Results that later steps do not overwrite.

        Raises:
            InputError: a requested recording fails, or CUDA is unusable after the attempt.
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
        """Record with copies of these stacks as static input; after a failure never try again."""
        # A stack of one view is the loader's tensor, which the loader frees.
        inputs = [stack.clone() for stack in stacks]
        graph = self._make()
        logger.info("recording the step as a CUDA graph")
        began = time.monotonic()
        self.capturing = True
        try:
            with in_stream(self._stream):
                self._outputs = graph.record(lambda: self._work(inputs))
        except torch.OutOfMemoryError:
            raise
        except CaptureFailed as error:
            raise InputError(
                f"cuda_graph is {'on' if self._asked else 'auto'!r} but must be 'off' for this step, which cannot be "
                f"recorded ({error}): continue with --resume and --cuda-graph off."
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
            logger.info("the step is one CUDA graph from here on (recorded in %.1f s)", time.monotonic() - began)
        finally:
            self.capturing = False
        gc.collect()  # a traceback holds a failed recording's tensors

    def drop(self) -> None:
        """Discard the graph; the next steps warm up for a new recording."""
        self._graph, self._outputs, self.inputs, self._done = None, (), None, 0
