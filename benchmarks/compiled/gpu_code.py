"""Generates Inductor's code for an NVIDIA GPU on a machine without one, and counts every kernel.

Only this file uses private parts of torch; it is known to work with torch 2.11 to 2.15.

AOTAutograd traces on the CPU, since its autograd engine needs a real CUDA context. Each graph is then moved to fake
CUDA tensors and compiled as on the GPU: same passes, same fusions, same Triton code. Nothing is computed; a graph
returns zeros that take no memory, so any batch size fits.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch._higher_order_ops.triton_kernel_wrap as wrap
import torch._inductor.compile_fx as compile_fx
import torch._inductor.graph as inductor_graph
import torch._inductor.scheduler as scheduler
import torch._subclasses.fake_impls as fake_impls
import torch.utils._foreach_utils as foreach_utils
import torch.utils._triton as triton_utils
from torch._dynamo import device_interface
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.codecache import PyCodeCache
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.ir import UserDefinedTritonKernel
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

from mvssl.models import batchnorm
from mvssl.training.compile import gpu_options
from pipelines.runtime import InputError, invalid

KNOWN_TORCH = ((2, 11), (2, 15))
"""Oldest and newest torch whose private parts this file is known to fit."""

TARGETS: dict[str, dict[str, Any]] = {
    "sm_80": {"name": "NVIDIA A100", "sms": 108, "l2": 40 << 20, "shared": 166912, "memory": 80 << 30},
    "sm_90": {"name": "NVIDIA H100", "sms": 132, "l2": 50 << 20, "shared": 232448, "memory": 80 << 30},
    "sm_100": {"name": "NVIDIA B200", "sms": 148, "l2": 126 << 20, "shared": 232448, "memory": 180 << 30},
}
"""Properties that Inductor's heuristics read: multiprocessors, bytes of L2, shared memory of a block and memory."""


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


def check_torch(version: str = torch.__version__) -> None:
    """Refuse an unknown torch."""
    found = tuple(int(number) for number in version.split(".")[:2])
    (low, high) = KNOWN_TORCH
    if not low <= found <= high:
        raise InputError(
            f"torch is {version} but must be {low[0]}.{low[1]} to {high[0]}.{high[1]}: bench_compile uses the "
            "compiler's private parts; install such a torch, or extend KNOWN_TORCH in benchmarks/compiled/gpu_code.py "
            "after its tests pass."
        )


def capability(target: str) -> int:
    """The compute capability of a target, 90 for sm_90.

    Raises:
        InputError: the target is unknown.
    """
    if target not in TARGETS:
        raise invalid("target", target, f"one of {', '.join(TARGETS)}", "choose the generation of your GPU")
    return int(target.removeprefix("sm_"))


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
        mock.patch.object(fake_impls, "torch", _TORCH),
        mock.patch.object(batchnorm, "KERNEL_DEVICES", ("cpu",)),
        mock.patch.object(driver, "_active", _Driver(target)),  # the target of the analysis of our kernels' accesses
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
    with V.set_fake_mode(fake_mode), _pretend(target), _named_kernels() as named:
        compile_fx.fake_tensor_prop(module, on_gpu, force_allow_non_fake_inputs=True)
        compile_fx.record_original_output_strides(module)
        compile_fx._recursive_post_grad_passes(module, is_inference=inference)
        lowered: Any = inductor_graph.GraphLowering(
            module, example_inputs=on_gpu, is_inference=inference, is_backward=backward, graph_id=len(graphs)
        )
        with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
            lowered.run(*on_gpu)
            code, _ = lowered.codegen()
            kernels = [kernel for node in lowered.scheduler.nodes for kernel in _account(node, named)]
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
    """Analyse the accesses of our Triton kernels once for each set of types instead of each launch."""
    name = next(name for name in ("identify_accessed_tensors", "identify_mutated_tensors") if hasattr(wrap, name))
    analyse: Callable[..., Any] = getattr(wrap, name)
    found: dict[Any, Any] = {}

    def cached(kernel: Any, kwargs: dict[str, Any], *rest: Any) -> Any:
        if any(rest) or not all(isinstance(value, (torch.Tensor, bool, int, float)) for value in kwargs.values()):
            return analyse(kernel, kwargs, *rest)
        key = (
            id(kernel),
            *((name, type(value), getattr(value, "dtype", value)) for name, value in kwargs.items()),
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


@dataclass(frozen=True)
class _Names:
    """Names of the generated Triton kernels.

    Attributes:
        fused: of the kernels that each entry of the schedule became, by the entry's id.
        own: of our kernels, by the id of their operation.
    """

    fused: dict[int, dict[str, None]] = field(default_factory=dict)
    own: dict[int, str] = field(default_factory=dict)


@contextlib.contextmanager
def _named_kernels() -> Iterator[_Names]:
    """Note the name of the Triton kernel that each entry of the schedule becomes."""
    names = _Names()
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


def _account(node: Any, names: _Names) -> list[Kernel]:
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


def _sources(code: str) -> dict[str, str]:
    """The Triton kernels in a graph's generated code."""
    found = re.findall(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, flags=re.DOTALL | re.MULTILINE)
    return dict(found)


class _Driver:
    """A Triton driver that only names its target."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability(target), 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda:0")


def _properties(target: str) -> Any:
    """What `torch.cuda.get_device_properties` returns on the target."""
    card, number = TARGETS[target], capability(target)
    return SimpleNamespace(
        name=card["name"],
        major=number // 10,
        minor=number % 10,
        multi_processor_count=card["sms"],
        total_memory=card["memory"],
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        L2_cache_size=card["l2"],
        shared_memory_per_block_optin=card["shared"],
        shared_memory_per_multiprocessor=card["shared"] + 1024,
        shared_memory_per_block=49152,
        gcnArchName="",
        clock_rate=1980000,
        memory_clock_rate=2619000,
        memory_bus_width=5120,
    )


@contextlib.contextmanager
def _pretend(target: str) -> Iterator[None]:
    """Make torch and Triton see one GPU of this kind."""
    properties, number = _properties(target), capability(target)
    interface: Any = device_interface.CudaInterface
    said: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_, **__: None,
        "get_device_properties": lambda *_, **__: properties,
        "get_device_capability": lambda *_, **__: (number // 10, number % 10),
    }
    asked: dict[str, Any] = {
        "get_device_properties": lambda device=None: properties,
        "get_compute_capability": lambda device=None: number,
        "is_available": lambda: True,
        "exchange_device": lambda device: 0,
        "maybe_exchange_device": lambda device: 0,
        "get_raw_stream": lambda device: 0,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in said.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in asked.items():
            stack.enter_context(mock.patch.object(interface, name, staticmethod(value)))
        stack.enter_context(
            mock.patch.object(interface.Worker, "get_device_properties", staticmethod(lambda device=None: properties))
        )
        for module in (scheduler, triton_utils):
            stack.enter_context(mock.patch.object(module, "has_triton", return_value=True))
        yield


def _memory_format(x: torch.Tensor, weight: torch.Tensor, backend: Any) -> torch.memory_format:
    """The layout in which cuDNN returns a convolution; without cuDNN torch's fake one says NCHW and adds copies."""
    last = torch.channels_last
    if x.dim() == 4 and (x.is_contiguous(memory_format=last) or weight.is_contiguous(memory_format=last)):
        return last
    chosen: torch.memory_format = torch._C._conv_determine_backend_memory_format(x, weight, backend)
    return chosen


class _Overlay:
    """A module with some attributes replaced."""

    def __init__(self, module: Any, **exchanged: Any) -> None:
        self._module = module
        self.__dict__.update(exchanged)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_TORCH = _Overlay(torch, _C=_Overlay(torch._C, _conv_determine_backend_memory_format=_memory_format))


@contextlib.contextmanager
def foreach_as_on_gpu() -> Iterator[None]:
    """Let torch's gradient norms and clipping use foreach kernels for CPU tensors, as for those on a GPU."""
    with mock.patch.object(foreach_utils, "_get_foreach_kernels_supported_devices", return_value=["cpu", "cuda"]):
        yield


def uncounted() -> contextlib.AbstractContextManager[Any]:
    """Hide operations from a dispatch mode that counts them."""
    hidden: contextlib.AbstractContextManager[Any] = _disable_current_modes()
    return hidden


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of one Triton kernel on the target.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's local memory and stack.
        shared: bytes of shared memory of a block.
    """

    registers: int
    spilled: int
    shared: int


def resources(source: str, *, target: str) -> Resources:
    """Compile a kernel's generated source ahead of time, in the first of its configurations.

    Args:
        source: of `Graph.sources`.
        target: the one that the source was generated for.
    """
    import triton
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner, StaticTritonCompileResult
    from triton.runtime.driver import driver

    binaries: list[Any] = []
    build: Any = triton.compile

    def compiled(*arguments: Any, **options: Any) -> Any:
        binaries.append(build(*arguments, **options))
        return binaries[-1]

    with (
        _pretend(target),
        mock.patch.object(driver, "_active", _Driver(target)),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
        mock.patch.object(triton, "compile", compiled),
        mock.patch.object(StaticTritonCompileResult, "can_statically_launch", return_value=None),
    ):
        module = PyCodeCache.load(source)
        (tuner,) = [value for value in vars(module).values() if isinstance(value, CachingAutotuner)]
        tuner._precompile_config(tuner.configs[0])
    (binary,) = binaries
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return Resources(
        registers=usage["REG"], spilled=usage["LOCAL"] + usage["STACK"], shared=int(binary.metadata.shared)
    )
