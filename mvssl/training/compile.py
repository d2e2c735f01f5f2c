"""torch.compile for forward and backward, with a loud fallback to eager mode."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch._inductor.config
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from mvssl.config.options import Execution
from mvssl.config.recipe import Recipe
from mvssl.training.compile_errors import describe, is_compile_error
from pipelines.files import cache_folder, cache_obstacle, writable_cache
from pipelines.runtime import InputError

logger = logging.getLogger("mvssl")
Result = TypeVar("Result")

CACHE_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variables of the caches of torch.compile and Triton, and our folders in the user's cache."""
_TORCHS_DEFAULT = default_cache_dir()  # torch sets its variable to this when it is imported
_CODE = (".so", ".cubin", ".py", ".cpp", ".json")  # files whose names torch or Triton derive from their contents
_RECOMPILE_LIMIT = 256  # graphs per function, one for each shape of networks in a process; torch's own limit is 8


def wants_compile(recipe: Recipe, execution: Execution, device: torch.device, *, ranks: int) -> bool:
    """Whether to compile; `auto` compiles on CUDA, but not with synchronised BatchNorm.

    Raises:
        InputError: compilation is requested with synchronised BatchNorm, whose communication no graph can hold.
    """
    synchronised = recipe.sync_batchnorm != "none" and ranks > 1
    if synchronised and execution.compile == "on":
        raise InputError(
            f"compile is 'on' but must be auto or off with sync_batchnorm {recipe.sync_batchnorm!r} on {ranks} ranks, "
            "whose communication no graph can hold: use --compile auto, or a new run with --sync-batchnorm none.",
            field="RunOptions.compile",
        )
    return execution.compile == "on" or (execution.compile == "auto" and device.type == "cuda" and not synchronised)


class Compiler:
    """Compiles functions of a step, and falls back to eager mode for all of them if one does not compile.

    Shapes are static and graph breaks are errors, so each function has one graph per input size.

    Attributes:
        compiled: whether the functions run compiled.
    """

    def __init__(self, modules: Sequence[nn.Module], *, enabled: bool, ranks: int = 1) -> None:
        """`modules`: those whose buffers and gradients the functions change."""
        self._modules = tuple(modules)
        self._ranks = ranks
        self.compiled = enabled
        self._proven = False

    def __call__(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Compile a function (at its first call)."""
        if not self.compiled:
            return function
        on_gpu = any(parameter.is_cuda for module in self._modules for parameter in module.parameters())
        compiled = torch.compile(function, dynamic=False, fullgraph=True, options=gpu_options() if on_gpu else None)

        def call(*arguments: Any) -> Result:
            return (compiled if self.compiled else function)(*arguments)

        return call

    def guard(self, work: Callable[..., Result]) -> Callable[..., Result]:
        """Wrap `work`, which calls compiled functions and runs their backward, so that it falls back to eager mode.

        If compilation fails in the first call, that call is repeated in eager mode, after buffers, gradients and random
        generators are restored. Once a call has succeeded all graphs exist, and errors are passed on.

        Raises:
            InputError: (when called) compilation fails in a run of several ranks; repeating the call on one of them
                would communicate what the others do not.
        """

        def call(*arguments: Any) -> Result:
            if self._proven or not self.compiled:
                return work(*arguments)
            return self._first(lambda: work(*arguments))

        return call

    def _first(self, work: Callable[[], Result]) -> Result:
        logger.info("compiling the step, which takes minutes unless an earlier run has left it in the cache ...")
        began = time.perf_counter()
        buffers = [buffer for module in self._modules for buffer in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        random = _RandomState(self._modules)
        try:
            with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):  # only read while compiling
                result = work()
        except Exception as error:
            if not is_compile_error(error):
                raise
            self._give_up(error)
        else:
            self._proven = True
            logger.info("compiled in %.0f s", time.perf_counter() - began)
            return result
        # Outside of the handler: the exception holds the first attempt's activations.
        gc.collect()
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        for module in self._modules:
            module.zero_grad(set_to_none=True)
        random.restore()
        return work()

    def _give_up(self, error: Exception) -> None:
        """Switch to eager mode with a warning."""
        told, remedy = describe(error, self._modules)
        if self._ranks > 1:
            raise InputError(
                f"compile is in use but must be 'off' on {self._ranks} ranks where torch.compile fails {told}: use "
                f"--compile off, and --resume if the run folder exists. {remedy}.",
                field="RunOptions.compile",
            ) from error
        logger.warning(
            "torch.compile FAILED %s and the step runs uncompiled, which is slower. %s; --compile off trains so on "
            "purpose.",
            told,
            remedy,
        )
        logger.debug("torch.compile failed", exc_info=error)
        self.compiled = False


class _RandomState:
    """The random generators of the CPU and of the modules' GPUs."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        devices = {parameter.device for module in modules for parameter in module.parameters()}
        self._gpus = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
        self._cpu = torch.get_rng_state()

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._gpus.items():
            torch.cuda.set_rng_state(state, device)


def gpu_options() -> dict[str, Any]:
    """Inductor's options on a GPU, as far as this version of torch knows them.

    Small independent kernels (casts of weights and gradients) share one launch instead of one launch each.
    """
    wanted = {"combo_kernels": True, "combo_kernels_pointwise_only": True, "combo_kernel_max_num_nodes": 64}
    known = torch._inductor.config.get_config_copy()
    return {name: value for name, value in wanted.items() if name in known}


def keep_compiled_code() -> None:
    """Let torch.compile and Triton cache compiled code in the user's cache folder.

    By default torch keeps it among the temporary files, which do not survive a reboot or a new container. Variables
    that are set already stay; so does torch's default if no cache folder can be used.
    """
    for variable, name in CACHE_FOLDERS.items():
        if os.environ.get(variable, _TORCHS_DEFAULT) != _TORCHS_DEFAULT:
            continue
        try:
            folder = writable_cache(cache_folder(), execute=True) / name
            obstacle = cache_obstacle(folder, execute=True)
        except OSError as error:
            obstacle = str(error)
        if obstacle is None:
            os.environ[variable] = str(folder)
            _remove_damaged(folder, whole_entries=variable == "TRITON_CACHE_DIR")
        else:
            logger.warning("compiled code is not cached for the next start: %s; set %s", obstacle, variable)


def _remove_damaged(cache: Path, *, whole_entries: bool) -> None:
    """Remove files that a power cut or a full disk has emptied or cut short, which are then compiled again.

    torch and Triton take what is there: a library that is cut short kills the process, anything else fails every time.

    Args:
        cache: folder of one of them.
        whole_entries: remove all files of an entry, a folder, if one is damaged.
    """
    damaged = [path for path in cache.rglob("*") if path.suffix in _CODE and path.is_file() and not _is_whole(path)]
    for path in damaged:
        with contextlib.suppress(OSError):  # another rank removes them too
            if whole_entries:
                shutil.rmtree(path.parent)
            else:
                path.unlink()
    if damaged:
        logger.warning(
            "%d cached files of compiled code are damaged and compiled again, e.g. %s", len(damaged), damaged[0]
        )


def _is_whole(path: Path) -> bool:
    """Whether a file is not empty and, if it is ELF (.so, .cubin), holds all that its headers name."""
    try:
        content = path.stat().st_size
        if path.suffix not in (".so", ".cubin") or sys.platform != "linux":
            return content > 0
        with path.open("rb") as file:
            header = file.read(64)
            segments, sections = struct.unpack_from("<QQ", header, 0x20)
            segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", header, 0x36)
            file.seek(segments)
            table = file.read(segment_size * segment_count)
            parts = [struct.unpack_from("<8x Q 16x Q", table, n * segment_size) for n in range(segment_count)]
    except (OSError, struct.error):
        return False
    ends = [sections + section_size * section_count, *(start + size for start, size in parts)]
    return header[:4] == b"\x7fELF" and max(ends) <= content
