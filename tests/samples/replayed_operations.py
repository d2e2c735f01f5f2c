"""A CUDA graph's behaviour on the CPU: operations recorded without effect, then repeated on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Keeps every operation with the very tensors it had, and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":
            self.calls.append((func, args, kwargs or {}, result))
        return result


class ReplayedGraph:
    """`mvssl.training.cuda_graph.Graph` on the CPU.

    As on CUDA, a recording leaves no trace in memory that was there before, a replay takes scalars as they were and
    tensors as they lie, and results lie where they lay at the recording.
    """

    def __init__(self, kept: Callable[[], Sequence[Tensor]]) -> None:
        """`kept` gives the tensors that the recorded operations change."""
        self._kept = kept
        self._tape = Tape()
        self.replays = 0

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        kept = list(self._kept())
        before = [tensor.detach().clone() for tensor in kept]
        random_state = torch.get_rng_state()
        with self._tape:
            results = work()
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
            for result in results:  # nothing may be read from it before the first replay
                result.fill_(float("nan"))
        torch.set_rng_state(random_state)
        return results

    def replay(self) -> None:
        self.replays += 1
        below: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
        with torch.no_grad(), below:
            for func, args, kwargs, result in self._tape.calls:
                again = func(*args, **kwargs)
                for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                        place.copy_(value)
