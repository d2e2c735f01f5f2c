"""torch.compile for the passes of a step, or plain Python with a loud message.

Compiled code kept from one start to the next: a step that took minutes to compile is there in seconds.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch._inductor.config
from torch import nn

from mvssl.config.recipe import Recipe
from mvssl.training.compile_errors import describe, is_compile_error
from pipelines.runtime import InputError, cache_folder

logger = logging.getLogger("mvssl")

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variables that name the caches of torch.compile and Triton, and ours in the user's cache folder."""


def keep_compiled_code() -> None:
    """Let torch.compile and Triton keep what they compile in the user's cache folder.

    By default torch keeps it among the temporary files, where it is gone with the next start of a machine or container.
    Variables that are set already stay; so does torch's default where the folder cannot be written.
    """
    for variable, name in FOLDERS.items():
        if variable in os.environ:
            continue
        folder = cache_folder() / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if writable:
            os.environ[variable] = str(folder)
        else:
            logger.warning(
                "compiled code is not kept for the next start: %s cannot be written; set %s", folder, variable
            )


Result = TypeVar("Result")

_VERSIONS = 256
"""Compiled versions that a function may have, one for each shape of networks in a process; torch's own limit is 8."""


def gpu_options() -> dict[str, Any]:
    """Inductor's options on a GPU, those that this torch knows.

    Independent small kernels (casts of weights and gradients) share a launch; by default each has one of its own.
    """
    wanted = {"combo_kernels": True, "combo_kernels_pointwise_only": True, "combo_kernel_max_num_nodes": 64}
    known = torch._inductor.config.get_config_copy()
    return {name: value for name, value in wanted.items() if name in known}


def wants_compile(recipe: Recipe, device: torch.device, *, ranks: int) -> bool:
    """Whether to compile; auto does on CUDA only, and not with BatchNorm over several ranks.

    Raises:
        InputError: it is asked for together with BatchNorm over several ranks, whose communication no graph can hold.
    """
    synchronised = recipe.sync_batchnorm != "none" and ranks > 1
    if synchronised and recipe.compile == "on":
        raise InputError(
            f"Recipe.compile is 'on' but must be auto or off with sync_batchnorm {recipe.sync_batchnorm!r} on {ranks} "
            "ranks, whose communication no graph can hold: set compile to auto, or sync_batchnorm to none."
        )
    return recipe.compile == "on" or (recipe.compile == "auto" and device.type == "cuda" and not synchronised)


class Compiler:
    """Calls functions through torch.compile as long as that works.

    Shapes are static and a graph break is an error, so each function has one graph per input size.

    Attributes:
        compiled: whether functions run compiled (not after a failure to compile).
    """

    def __init__(self, modules: Sequence[nn.Module], *, enabled: bool, ranks: int = 1) -> None:
        """`modules` are those whose buffers and gradients the functions change."""
        self._modules = tuple(modules)
        self._ranks = ranks
        self.compiled = enabled
        self._proven = False

    def __call__(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """The function, compiled at its first call if that is wanted."""
        if not self.compiled:
            return function
        on_gpu = any(parameter.is_cuda for module in self._modules for parameter in module.parameters())
        options = gpu_options() if on_gpu else None
        fast = torch.compile(function, dynamic=False, fullgraph=True, options=options)

        def call(*arguments: Any) -> Result:
            return (fast if self.compiled else function)(*arguments)

        return call

    def run(self, work: Callable[[], Result]) -> Result:
        """Do `work`, which calls the functions; the first time, do it again without compiling if compiling fails.

        Before the second attempt all that the first one changed is put back: buffers and gradients of the modules, and
        the random number generators. Once a whole `work` with its backward has gone through, all graphs exist and
        errors are passed on.

        Raises:
            InputError: compiling fails where several ranks train: on one alone the second attempt would communicate
                what the others do not.
        """
        if not self.compiled or self._proven:
            return work()
        logger.info("compiling the step, which takes minutes unless an earlier run has left it in the cache ...")
        began = time.perf_counter()
        buffers = [buffer for module in self._modules for buffer in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        random = _RandomState(self._modules)
        try:
            with torch._dynamo.config.patch(recompile_limit=_VERSIONS):  # which is looked at when compiling alone
                result = work()
        except Exception as error:
            if not is_compile_error(error):
                raise
            self._give_up(error)
        else:
            self._proven = True
            logger.info("compiled in %.0f s", time.perf_counter() - began)
            return result
        # Out of the handler: the exception holds the first attempt's activations.
        gc.collect()
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        for module in self._modules:
            module.zero_grad(set_to_none=True)
        random.restore()
        return work()

    def _give_up(self, error: Exception) -> None:
        """Compile no more, and say why.

        Raises:
            InputError: there are several ranks.
        """
        told, remedy = describe(error, self._modules)
        if self._ranks > 1:
            raise InputError(
                f"Recipe.compile is in use but must be 'off' on {self._ranks} ranks where torch.compile fails {told}: "
                f"set Recipe.compile to 'off'. {remedy}."
            ) from error
        logger.warning(
            "torch.compile FAILED %s and the step runs uncompiled, which is slower. %s; set Recipe.compile to 'off' "
            "to train so on purpose.",
            told,
            remedy,
        )
        logger.debug("torch.compile failed", exc_info=error)
        self.compiled = False


class _RandomState:
    """What layers will draw next (stochastic depth), on the CPU and on the modules' GPU."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        devices = {parameter.device for module in modules for parameter in module.parameters()}
        self._gpus = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
        self._cpu = torch.get_rng_state()

    def restore(self) -> None:
        """Let it be drawn again."""
        torch.set_rng_state(self._cpu)
        for device, state in self._gpus.items():
            torch.cuda.set_rng_state(state, device)
