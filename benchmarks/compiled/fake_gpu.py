"""A GPU that is not there: what torch, Inductor and Triton ask of one is answered, and kernels are compiled for it.

This file, `schedule.py` and `gpu_code.py` use private parts of torch; they are known to work with torch 2.11 to 2.15.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.scheduler as scheduler
import torch.utils._foreach_utils as foreach_utils
import torch.utils._triton as triton_utils
from torch._dynamo import device_interface
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from torch.utils._python_dispatch import _disable_current_modes

from pipelines.runtime import InputError, invalid

KNOWN_TORCH = ((2, 11), (2, 15))
"""Oldest and newest torch whose private parts these files are known to fit."""

TARGETS: dict[str, dict[str, Any]] = {
    "sm_80": {"name": "NVIDIA A100", "sms": 108, "l2": 40 << 20, "shared": 166912, "memory": 80 << 30},
    "sm_90": {"name": "NVIDIA H100", "sms": 132, "l2": 50 << 20, "shared": 232448, "memory": 80 << 30},
    "sm_100": {"name": "NVIDIA B200", "sms": 148, "l2": 126 << 20, "shared": 232448, "memory": 180 << 30},
}
"""Properties that Inductor's heuristics read: multiprocessors, bytes of L2, shared memory of a block and memory."""


def check_torch(version: str = torch.__version__) -> None:
    """Refuse an unknown torch."""
    found = tuple(int(number) for number in version.split(".")[:2])
    (low, high) = KNOWN_TORCH
    if not low <= found <= high:
        raise InputError(
            f"torch is {version} but must be {low[0]}.{low[1]} to {high[0]}.{high[1]}: bench_compile uses the "
            "compiler's private parts; install such a torch, or extend KNOWN_TORCH in benchmarks/compiled/fake_gpu.py "
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


class Driver:
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
def pretend(target: str) -> Iterator[None]:
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


TORCH = _Overlay(torch, _C=_Overlay(torch._C, _conv_determine_backend_memory_format=_memory_format))


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
        pretend(target),
        mock.patch.object(driver, "_active", Driver(target)),
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
