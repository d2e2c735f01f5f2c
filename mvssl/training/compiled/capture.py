"""The whole step as one CUDA graph: recorded once, then replayed by a single launch.

Launched one by one, the thousands of kernels of a step keep the host busier than the device, and the loader's thread
competes with the launches for Python's lock. A replay needs neither.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pipelines.errors import InputError

logger = logging.getLogger("mvssl")

WARM_UP = 3
"""Steps before the recording, in which kernels are compiled and chosen and optimisers make their state. Real steps."""
WARM_UP_RANKS = 11
"""The same with DistributedDataParallel (torch's notes on CUDA graphs: at least 11)."""


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


class CudaGraph:
    """`Graph` on CUDA. Its memory is its own: activations of a step stay reserved between replays."""

    def __init__(self, stream: Any = None) -> None:
        """`stream` is where to record; None takes one of torch's."""
        self._graph: Any = torch.cuda.CUDAGraph()
        self._stream = stream

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Record beside the current stream; threads of the loader go on launching and allocating meanwhile."""
        gc.collect()  # what cycles still hold of the steps before would be missing in the graph's own memory
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """Run what was recorded, in the current stream."""
        self._graph.replay()


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
        asked: bool = False,
        warm_up: int = WARM_UP,
        stream: Any = None,
        graph: Callable[[], Graph] = CudaGraph,
    ) -> None:
        """Nothing is run or recorded yet.

        Args:
            work: a whole step, from stacks on the device to its results there; reads nothing back.
            forget: clears what a failed recording of `work` left behind.
            wanted: whether to record at all.
            asked: whether the user insists: then a failure to record is an error.
            warm_up: steps run one by one before the recording.
            stream: where they run; None is the current one.
            graph: makes what records.
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
            InputError: it cannot be recorded though the user asked for it.
            torch.OutOfMemoryError: the device's memory is full.
        """
        if self._graph is None and self._wanted and self._done >= self._warm_up:
            self._record(stacks)
        if self._graph is None:
            self._done += 1
            with in_stream(self._stream):
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
            self._outputs = graph.record(lambda: self._work(inputs))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            reason = f"{type(error).__name__}: {reason}"
            self._forget()
            self._wanted = False
            if self._asked:
                raise InputError(
                    f"cuda_graph is 'on' but this step cannot be recorded ({reason}): set it to auto or off."
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

    def drop(self) -> None:
        """Forget the recording; the next steps warm up for another one."""
        self._graph, self._outputs, self.inputs, self._done = None, (), None, 0
