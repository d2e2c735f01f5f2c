"""Generates Inductor's code for an NVIDIA GPU on a machine without one, and counts every kernel.

AOTAutograd traces on the CPU, since its autograd engine needs a real CUDA context. Each graph is then moved to fake
CUDA tensors and compiled as on the GPU: same passes, same fusions, same Triton code. Nothing is computed; a graph
returns zeros that take no memory, so any batch size fits.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch._higher_order_ops.triton_kernel_wrap as wrap
import torch._inductor.compile_fx as compile_fx
import torch._inductor.graph as inductor_graph
import torch._subclasses.fake_impls as fake_impls
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V

from benchmarks.compiled.fake_gpu import TORCH, Driver, capability, check_torch, pretend, uncounted
from benchmarks.compiled.schedule import Kernel, kernels_of, named_kernels
from mvssl.models import batchnorm
from mvssl.training.compile import gpu_options
from pipelines.runtime import InputError


@dataclass(kw_only=True)
class Graph:
    """One compiled graph.

    Attributes:
        kind: forward, backward, or inference (a forward without gradient).
        kernels: in the order of execution.
        triton_launches, library_calls: counted in the generated code.
        sources: Triton source of each distinct kernel, by its name.
        saved_megabytes: activations that a forward keeps for its backward (10^6 bytes).
        calls: how often a step runs the graph.
    """

    kind: str
    kernels: list[Kernel]
    triton_launches: int
    library_calls: int
    sources: dict[str, str]
    saved_megabytes: float = 0.0
    calls: int = field(default=0)

    @property
    def megabytes(self) -> float:
        """Traffic of one run."""
        return sum(kernel.megabytes for kernel in self.kernels)

    @property
    def gflops(self) -> float:
        """Arithmetic of one run."""
        return sum(kernel.gflops for kernel in self.kernels)


def gpu_graphs(work: Callable[[], object], *, target: str, graphs: list[Graph] | None = None) -> list[Graph]:
    """Run `work`, whose calls of `torch.compile` generate code for a GPU, and return the graphs in order of creation.

    Args:
        work: calls compiled functions on CPU tensors, forward and backward. Their results are zeros.
        target: a key of `TARGETS`.
        graphs: list to append to, for `work` to look at.

    Raises:
        InputError: torch or the target is unknown, or Triton is missing.
    """
    check_torch()
    capability(target)
    try:
        from triton.runtime.driver import driver
    except ImportError as error:
        raise InputError(
            "triton is missing but must be installed, since it generates a GPU's kernels: pip install triton."
        ) from error
    graphs = [] if graphs is None else graphs
    real = torch.compile

    def inner(module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        return _compile(module, inputs, target, graphs, options)

    def compile_for_gpu(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        settings = gpu_options()
        options.pop("options", None)

        def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            # Without caches, or CPU code of the same graph comes back. The patches hold for the backward, too.
            return compile_fx.compile_fx(
                module,
                list(inputs),
                inner_compile=inner,
                config_patches={**settings, "force_disable_caches": True},
                decompositions={**select_decomp_table(), **_DECOMPOSITIONS},
            )

        fast = real(function, backend=backend, **options)

        def call(*arguments: Any) -> Any:
            with uncounted():  # torch.compile refuses to run under a counting mode
                return fast(*arguments)

        return call

    torch._dynamo.reset()
    with (
        mock.patch.object(torch, "compile", compile_for_gpu),
        mock.patch.object(fake_impls, "torch", TORCH),
        mock.patch.object(batchnorm, "KERNEL_DEVICES", ("cpu",)),
        mock.patch.object(driver, "_active", Driver(target)),  # the target of the analysis of our kernels' accesses
        _cached_analyses(),
    ):
        work()
    torch._dynamo.reset()
    return graphs


def _compile(
    module: torch.fx.GraphModule, inputs: Sequence[Any], target: str, graphs: list[Graph], options: dict[str, Any]
) -> Callable[..., Any]:
    """`compile_fx_inner` for a fake GPU: generates and keeps the code, and returns a function that gives zeros."""
    returned = next(node for node in module.graph.nodes if node.op == "output").args[0]
    results = [_description(node) for node in returned]
    saved = {node: _description(node) for node in returned if getattr(node, "op", "placeholder") != "placeholder"}
    fake_mode: Any = torch._guards.detect_fake_mode(inputs)
    _to_cuda(module)
    with fake_mode:
        on_gpu = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
            if isinstance(value, torch.Tensor)
            else value
            for value in inputs
        ]
    inference, backward = options.get("is_inference", False), options.get("is_backward", False)
    with V.set_fake_mode(fake_mode), pretend(target), named_kernels() as named:
        compile_fx.fake_tensor_prop(module, on_gpu, force_allow_non_fake_inputs=True)
        compile_fx.record_original_output_strides(module)
        compile_fx._recursive_post_grad_passes(module, is_inference=inference)
        lowered: Any = inductor_graph.GraphLowering(
            module, example_inputs=on_gpu, is_inference=inference, is_backward=backward, graph_id=len(graphs)
        )
        with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
            lowered.run(*on_gpu)
            code, _ = lowered.codegen()
            kernels = [kernel for node in lowered.scheduler.nodes for kernel in kernels_of(node, named)]
    source = str(getattr(code, "value", code))
    graph = Graph(
        kind="backward" if backward else "inference" if inference else "forward",
        kernels=kernels,
        triton_launches=len(re.findall(r"\.run\(", source)),
        library_calls=len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.[\w.]+\(|(?<![\w.])aten\.[\w.]+\(", source)),
        sources=_sources(source),
        saved_megabytes=sum(each.nbytes for each in saved.values() if isinstance(each, _Description)) / 1e6,
    )
    graphs.append(graph)

    def run(*_: Any) -> list[Any]:
        graph.calls += 1
        with uncounted():  # zeros are no work of the step
            return [
                _zeros(result, dense=backward) if isinstance(result, _Description) else result for result in results
            ]

    boxed: Callable[..., Any] = make_boxed_func(run)
    return boxed


@contextlib.contextmanager
def _cached_analyses() -> Iterator[None]:
    """Analyse the accesses of our Triton kernels once for each set of types and constants instead of each launch."""
    name = next(name for name in ("identify_accessed_tensors", "identify_mutated_tensors") if hasattr(wrap, name))
    analyse: Callable[..., Any] = getattr(wrap, name)
    found: dict[Any, Any] = {}

    def cached(kernel: Any, kwargs: dict[str, Any], *rest: Any) -> Any:
        if any(rest) or not all(isinstance(value, (torch.Tensor, bool, int, float)) for value in kwargs.values()):
            return analyse(kernel, kwargs, *rest)
        # Triton writes constants, and sizes of 1, into the kernel's code; other sizes change no access.
        constants = {param.name for param in kernel.params if param.is_constexpr}
        key = (
            id(kernel),
            *(
                (name, type(value), getattr(value, "dtype", value if name in constants else value == 1))
                for name, value in kwargs.items()
            ),
        )
        if key not in found:
            found[key] = analyse(kernel, kwargs, *rest)
        return found[key]

    with mock.patch.object(wrap, name, cached):
        yield


@dataclass(frozen=True)
class _Description:
    """A tensor's shape, strides and dtype."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.shape.numel() * self.dtype.itemsize


def _description(node: Any) -> Any:
    """The description of a tensor that a graph returns, or the value itself."""
    value = getattr(node, "meta", {}).get("val")
    return _Description(value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else node


def _bernoulli(x: torch.Tensor, p: float = 0.5, *, generator: None = None) -> torch.Tensor:
    """How a GPU makes random bits; on the CPU torch keeps the operation."""
    return (torch.rand_like(x, dtype=torch.float32) < p).to(x.dtype)


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {torch.ops.aten.bernoulli.p: _bernoulli}


def _zeros(result: _Description, *, dense: bool) -> torch.Tensor:
    """Zeros of this shape; large ones share one element unless `dense`, so strides are 0 there.

    Gradients must be dense: autograd copies others into the parameter's layout.
    """
    if dense or result.shape.numel() <= 4_000_000:
        return torch.empty_strided(result.shape, result.stride, dtype=result.dtype).zero_()
    return torch.zeros((), dtype=result.dtype).as_strided(result.shape, [0] * len(result.shape))


def _to_cuda(module: torch.fx.GraphModule) -> None:
    """Let a graph that was traced on the CPU create its tensors on CUDA."""
    device = torch.device("cuda:0")
    for node in module.graph.nodes:
        node.meta.pop("val", None)
        if node.op == "call_function":
            node.args = tuple(device if isinstance(argument, torch.device) else argument for argument in node.args)
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": device}
    module.recompile()


def _sources(code: str) -> dict[str, str]:
    """The Triton kernels in a graph's generated code."""
    found = re.findall(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, flags=re.DOTALL | re.MULTILINE)
    return dict(found)
