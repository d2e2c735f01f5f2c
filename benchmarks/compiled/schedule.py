"""The kernels of Inductor's schedule: their names, traffic, arithmetic, and the layers that they come from."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch._inductor.scheduler as scheduler
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.ir import UserDefinedTritonKernel
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One entry of the compiler's schedule: a Triton kernel or a library call.

    Attributes:
        name: of the Triton kernel or the library function.
        library: whether it is a call of cuDNN, cuBLAS or ATen.
        megabytes: device memory traffic by Inductor's count, each buffer read or written once (10^6 bytes).
        gflops: of convolutions and products, by torch's formulas.
        layers: modules of its operations; a library call has one.
        source: key in `Graph.sources`; empty for library calls.
    """

    name: str
    library: bool
    megabytes: float
    gflops: float
    layers: tuple[str, ...]
    source: str = ""


@dataclass(frozen=True)
class Names:
    """Names of the generated Triton kernels.

    Attributes:
        fused: of the kernels that each entry of the schedule became, by the entry's id.
        own: of our kernels, by the id of their operation.
    """

    fused: dict[int, dict[str, None]] = field(default_factory=dict)
    own: dict[int, str] = field(default_factory=dict)


@contextlib.contextmanager
def named_kernels() -> Iterator[Names]:
    """Note the name of the Triton kernel that each entry of the schedule becomes."""
    names = Names()
    define: Any = TritonScheduling.define_kernel
    define_own: Any = PythonWrapperCodegen.define_user_defined_triton_kernel
    generate: Any = UserDefinedTritonKernel.codegen
    current: list[int] = []
    entries: list[int] = []

    def noted(self: Any, source: str, *rest: Any) -> str:
        name: str = define(self, source, *rest)
        if entries:
            names.fused.setdefault(entries[-1], {})[name] = None
        return name

    def entered(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, node: Any, *rest: Any, **options: Any) -> Any:
            entries.append(id(node))
            try:
                return method(self, node, *rest, **options)
            finally:
                entries.pop()

        return call

    def generated(self: Any, *arguments: Any, **options: Any) -> Any:
        current.append(id(self))
        try:
            return generate(self, *arguments, **options)
        finally:
            current.pop()

    def noted_own(self: Any, *arguments: Any, **options: Any) -> Any:
        result = define_own(self, *arguments, **options)
        names.own[current[-1]] = result[0]
        return result

    with contextlib.ExitStack() as stack:
        for owner, method, replacement in (
            (TritonScheduling, "define_kernel", noted),
            (UserDefinedTritonKernel, "codegen", generated),
            (PythonWrapperCodegen, "define_user_defined_triton_kernel", noted_own),
        ):
            stack.enter_context(mock.patch.object(owner, method, replacement))
        for method in _GENERATORS:
            if (generator := getattr(TritonScheduling, method, None)) is not None:
                stack.enter_context(mock.patch.object(TritonScheduling, method, entered(generator)))
        yield names


_GENERATORS = (
    "codegen_node",
    "codegen_combo_kernel",
    "codegen_mix_order_reduction",
    "codegen_nested_reduction",  # not in torch 2.11
    "codegen_template",
)
"""Methods of `TritonScheduling` that generate the kernels of one entry of the schedule."""


def _members(node: Any) -> list[Any]:
    """The single operations of an entry of the schedule, which may be a group of groups."""
    nodes = node.get_nodes()
    return [node] if nodes == [node] else [member for each in nodes for member in _members(each)]


def kernels_of(node: Any, names: Names) -> list[Kernel]:
    """The kernels of one entry of the schedule; none for entries without work on the device.

    An entry with more than one kernel (large groups of independent small ones) gives the first all of its bytes.
    """
    members = _members(node)
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return []
    library = isinstance(node, scheduler.ExternKernelSchedulerNode)
    if library and type(node.node).__name__ == "MultiOutput":
        return []
    origins = [origin for member in members if member.node is not None for origin in member.node.get_origins()]
    if type(node.node).__name__ == "UserDefinedTritonKernel":
        library = False
        sources = [names.own[id(node.node)]]
        called = [str(node.node.get_kernel_and_metadata()[0].fn.__name__)]
    elif library:
        origins = _own(node)
        sources = [""]
        called = [str(getattr(node.node, "python_kernel_name", None) or type(node.node).__name__)]
    else:
        sources = [*names.fused.get(id(node), {"triton": None})]  # its generator is not in _GENERATORS
        called = sources
    first = Kernel(
        name=called[0],
        library=library,
        megabytes=(node.get_read_write_buffers_sizes() - _written_only(node)) / 1e6,
        gflops=sum(map(_flops, _own(node))) / 1e9 if library else 0.0,
        layers=tuple(layer for layer, _ in Counter(filter(None, map(_layer, origins))).most_common()),
        source=sources[0],
    )
    others = zip(called[1:], sources[1:], strict=True)
    return [first, *(replace(first, name=name, source=source, megabytes=0.0) for name, source in others)]


def _written_only(node: Any) -> int:
    """Bytes that Inductor counts twice: it counts what our Triton kernels write as read, too."""
    if type(node.node).__name__ != "UserDefinedTritonKernel":
        return 0
    return sum(int(each.get_numel()) * each.get_dtype().itemsize for each in node.node.mutable_args)


def _own(node: Any) -> list[Any]:
    """The operation of the graph that a library call carries out."""
    origin = node.node.get_origin_node()
    return [origin] if origin is not None else list(node.node.get_origins())[:1]


def _flops(node: Any) -> float:
    """Floating-point operations of a convolution, product or attention; 0 for everything else."""
    packet = getattr(node.target, "overloadpacket", None)
    packet = _ATTENTION.get(str(packet), packet)
    if packet not in flop_registry:
        return 0.0

    def value(argument: Any) -> Any:
        return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument

    arguments = torch.fx.node.map_aggregate(node.args, value)
    options = torch.fx.node.map_aggregate(node.kwargs, value)
    count: Any = flop_registry[packet]
    return float(count(*arguments, **options, out_val=node.meta["val"]))


_ATTENTION = {
    "aten._scaled_dot_product_flash_attention_for_cpu": torch.ops.aten._scaled_dot_product_flash_attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}
"""Attention as it is traced on the CPU, and as it runs on a GPU: the same inputs, outputs and arithmetic."""


def _layer(node: Any) -> str | None:
    """Name of the module that an operation comes from, without its wrappers."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return None
    path = list(stack.values())[-1][0]
    found = re.sub(r"\['(\w+)'\]|\.slice\(.*?\)", r".\1", str(path))
    return re.sub(
        r"^L\.self\.|^L\['self'\]\.?|^self\.|\._modules|_encode\.__self__\.?|\[(\d+)\]",
        lambda match: f".{match[1]}" if match[1] else "",
        found,
    ).strip(".")
