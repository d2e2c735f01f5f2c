"""Whether a training step could be recorded once and replayed, found out on the CPU from the operations it calls.

A CUDA graph repeats the operations that it has seen, with the scalar arguments and the addresses of that time. So two
steps must be the same operations with the same scalars on the same memory, and nothing may read a value of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mvssl.training.step import TrainStep

READS_THE_DEVICE = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "repeat_interleave",
    "bincount",
    "allclose",
)
"""Operations whose result is a value on the host, or whose shape depends on values."""
COMES_FROM_THE_HOST = ("lift_fresh", "lift_fresh_copy", "lift")
"""What torch.tensor(...) calls: a graph would keep the values of its recording."""


class NotReady(AssertionError):
    """A step that cannot be replayed, and why."""


class Recorder(TorchDispatchMode):
    """Notes every operation with its scalars, and which memory it reads and writes.

    Memory that is there before (`kept`) counts by its address and everything else by when it was made, so that
    temporary tensors may lie anywhere.
    """

    def __init__(self, kept: dict[str, Tensor]) -> None:
        super().__init__()
        self.operations: list[str] = []
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in kept.items() if tensor.numel()}
        self._alive: list[Any] = []  # or a later tensor could lie where one of before has lain

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket.__name__
        if func.namespace == "profiler":  # marks without an effect
            return func(*args, **(kwargs or {}))
        if packet in READS_THE_DEVICE or (packet == "index" and _is_boolean(args[1])):
            raise NotReady(f"{packet} reads a value of the device on the host")
        if packet in COMES_FROM_THE_HOST:
            raise NotReady(f"{packet} makes a tensor of a number of the host")
        words = [str(func), *self._describe(args), *self._describe(list((kwargs or {}).items()))]
        result = func(*args, **(kwargs or {}))
        words += ["->", *self._describe(result)]
        self.operations.append(" ".join(words))
        return result

    def _describe(self, value: Any) -> Iterator[str]:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            name = self._names.get(storage.data_ptr())
            if name is None:
                name = self._names[storage.data_ptr()] = f"#{len(self._alive)}"
                self._alive.append(storage)
            yield f"{name}:{value.dtype}{list(value.shape)}{list(value.stride())}+{value.storage_offset()}"
        elif isinstance(value, list | tuple):
            yield "["
            for each in value:
                yield from self._describe(each)
            yield "]"
        else:
            yield repr(value)


def _is_boolean(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def kept_tensors(step: TrainStep) -> dict[str, Tensor]:
    """Every tensor that lives on between the steps of a run, by name."""
    kept: dict[str, Tensor] = {}
    for network, module in (("online", step.online), ("target", step.target)):
        if module is not None:
            kept |= {f"{network}.{name}": p for name, p in module.named_parameters()}
            kept |= {f"{network}.{name}": b for name, b in module.named_buffers()}
    for number, (_, state) in enumerate(step.optimizer.state.items()):
        kept |= {f"state.{number}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    for number, group in enumerate(step.optimizer.param_groups):
        kept |= {f"group.{number}.{name}": value for name, value in group.items() if isinstance(value, Tensor)}
    kept["pace"] = step._one_minus_tau
    kept["weights"] = step._weights
    if step.scaler.is_enabled() and step.scaler._scale is not None and step.scaler._growth_tracker is not None:
        kept |= {"scale": step.scaler._scale, "growth": step.scaler._growth_tracker}
    return kept


def gradients(step: TrainStep) -> list[str]:
    """Names of the parameters that have a gradient."""
    return [name for name, p in step.online.named_parameters() if p.grad is not None]


def assert_ready(step: TrainStep, make_batch: Callable[[int], list[Tensor]], *, warm_up: int = 2) -> list[str]:
    """Take steps and compare two of them in which every scheduled number differs.

    Args:
        step: freshly built, on the CPU.
        make_batch: the views of a step.
        warm_up: steps before, in which optimisers make their state.

    Returns:
        The operations of a step.

    Raises:
        NotReady: a replay of one of these steps would not be the other one.
    """
    recorders: list[Recorder] = []
    before: dict[str, int] = {}
    inputs: list[Tensor] = []
    work = step._graph._work

    def recorded(stacks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if not inputs:
            inputs.extend(stack.clone() for stack in stacks)
        for place, stack in zip(inputs, stacks, strict=True):
            place.copy_(stack)
        kept = kept_tensors(step) | {f"input.{number}": place for number, place in enumerate(inputs)}
        addresses = {name: tensor.data_ptr() for name, tensor in kept.items()}
        if before and addresses != before:
            moved = sorted(name for name in addresses.keys() | before if addresses.get(name) != before.get(name))
            raise NotReady(f"{moved} lie elsewhere than in the step before")
        before.update(addresses)
        if left := gradients(step):
            raise NotReady(f"{left} have a gradient from before the step")
        with Recorder(kept) as recorder:
            outputs = work(inputs)
        if left := gradients(step):
            raise NotReady(f"{left} have a gradient behind the step")
        recorders.append(recorder)
        return outputs

    for number in range(warm_up):
        step(make_batch(number), number)
    step._graph._work = recorded
    try:
        for number in (warm_up, warm_up + 1):
            step(make_batch(number), number)
    finally:
        step._graph._work = work
    one, other = (recorder.operations for recorder in recorders)
    for number, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            raise NotReady(f"operation {number} differs from step to step: {mine} and then {theirs}")
    if len(one) != len(other):
        raise NotReady(f"one step has {len(one)} operations, the next {len(other)}")
    return one
