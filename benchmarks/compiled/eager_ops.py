"""Counts launches and bytes of a step outside its compiled graphs: the optimiser, the EMA, the stacking of views.

The operations run on CPU tensors; launches are those of torch's CUDA kernels for the same tensors.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CHUNK = 65_536
"""Elements of a tensor that one block of a foreach kernel handles."""

BLOCKS = 320
"""Blocks of one launch of a foreach kernel, at most."""

TENSORS = (110, 64, 48, 36, 30)
"""Tensors per list of one launch of a foreach kernel, at most, by the number of lists."""

CAT_INPUTS = 128
"""Tensors that one launch of torch.cat takes."""

NORM_OUTPUTS = 400
"""Tensors whose norms one launch adds up."""

_WRITES_ONLY = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "_foreach_copy_", "_foreach_zero_")
"""Operations that write their first argument without reading it."""

_READS_NOTHING = ("_like", "new_zeros", "new_ones", "new_full")
"""Ends of the names of operations that take shape and dtype of a tensor, not its values."""

_ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "set_")
"""Operations that launch nothing."""


@dataclass(kw_only=True)
class Work:
    """Total cost of operations.

    Attributes:
        launches: kernels.
        megabytes: device memory traffic: inputs and outputs once each; in-place arguments are read and written.
        operations: launches of each.
    """

    launches: int = 0
    megabytes: float = 0.0
    operations: Counter[str] = field(default_factory=Counter)


def foreach_launches(sizes: Sequence[int], lists: int) -> int:
    """Launches of torch's `multi_tensor_apply`.

    Args:
        sizes: elements of each tensor of a list.
        lists: number of tensor lists that the kernel reads or writes.
    """
    most = TENSORS[lists - 1]
    launches = blocks = tensors = 0
    for size in sizes:
        chunks = -(-size // CHUNK)
        tensors += chunks > 0
        for chunk in range(1, chunks + 1):
            blocks += 1
            full = tensors == most and chunk == chunks
            if full or blocks == BLOCKS:
                launches += 1
                blocks = 0
                tensors = 0 if chunk == chunks else 1  # the rest of a tensor goes into the next launch
    return launches + (blocks > 0)


class Account(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts the operations that run under it, by region.

    Attributes:
        work: of each region.
    """

    def __init__(self, region: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.work: dict[str, Work] = {}
        self._region = region

    @contextlib.contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Count operations under this name."""
        before, self._region = self._region, name
        try:
            yield
        finally:
            self._region = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        result = func(*args, **options)
        launches, moved = cost(func, args, options, result)
        if launches:
            work = self.work.setdefault(self._region, Work())
            work.launches += launches
            work.megabytes += moved / 1e6
            work.operations[func.overloadpacket.__name__] += launches
        return _as_on_gpu(func, args, result)


def cost(func: Any, args: Sequence[Any], options: Mapping[str, Any], result: Any) -> tuple[int, int]:
    """Launches and bytes of one operation; zeros for views, allocations and values read by the host."""
    name: str = func.overloadpacket.__name__
    outputs = _tensors(result)
    schema = func._schema.arguments
    values = {argument.name: value for argument, value in zip(schema, args, strict=False)} | dict(options)
    changed = [
        tensor
        for argument in schema
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(values.get(argument.name))
    ]
    inputs = [tensor for value in values.values() for tensor in _tensors(value)]
    if name in _ALLOCATES or not (changed or outputs):
        return 0, 0
    known = {_storage(tensor) for tensor in inputs}
    made = [tensor for tensor in outputs if _storage(tensor) not in known]
    if not changed and not made:
        return 0, 0  # a view
    if name in _WRITES_ONLY:
        inputs = [tensor for tensor in inputs if not any(tensor is each for each in changed)]
    if name.endswith(_READS_NOTHING):
        inputs = []
    moved = sum(map(_bytes, [*_distinct(inputs), *changed, *made]))
    lists = [tensors for value in values.values() if isinstance(value, (list, tuple)) and (tensors := _tensors(value))]
    return _launches(name, lists, made, outputs), moved


def _launches(name: str, lists: list[list[Tensor]], made: list[Tensor], outputs: list[Tensor]) -> int:
    """Launches of one operation over these lists of tensors."""
    if name in ("cat", "stack"):
        return -(-len(lists[0]) // CAT_INPUTS)
    if not name.startswith(("_foreach_", "_fused_", "_amp_foreach_")):
        return 1
    sizes = [tensor.numel() for tensor in lists[0]]
    if name == "_foreach_norm":  # zeros for partial results, partial norms, norms
        return 1 + foreach_launches(sizes, 1) + -(-len(sizes) // NORM_OUTPUTS)
    if name.startswith("_fused_"):  # step counters are lists, too
        lists = [tensors for tensors in lists if tensors[0].numel() == sizes[0] or tensors[0].dim() > 0]
    elif not all(_alike(lists[0], tensors) for tensors in lists[1:]):
        return len(sizes)  # torch's slow path: a launch a tensor
    out = 1 if len(made) == len(outputs) == len(sizes) else 0
    return foreach_launches(sizes, len(lists) + out)


def _as_on_gpu(func: Any, args: Sequence[Any], result: Any) -> Any:
    """New tensors of a foreach operation with the strides of its inputs, as CUDA's kernels give them.

    The CPU's give others to dimensions of size 1, and the next foreach operation would fall back to single launches.
    """
    if not func.overloadpacket.__name__.startswith("_foreach_") or not isinstance(result, (list, tuple)):
        return result
    inputs = _tensors(args[0])
    if len(inputs) != len(result):
        return result
    return [
        made.as_strided(given.shape, given.stride()) if made.shape == given.shape else made
        for made, given in zip(result, inputs, strict=True)
    ]


def _alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether the tensors of two lists have the same shapes, strides and dtypes."""
    return all(
        a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        for a, b in zip(some, others, strict=True)
    )


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument or result."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors(each)]
    return []


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor has in memory; an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()
