"""torch.compile for the passes of a step, or plain Python with a loud message."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from mvssl.recipe import Recipe
from pipelines.errors import InputError

logger = logging.getLogger("mvssl")
Result = TypeVar("Result")

_VERSIONS = 256
"""Compiled versions that a function may have, one for each shape of networks in a process; torch's own limit is 8."""


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
        fast = torch.compile(function, dynamic=False, fullgraph=True)

        def call(*arguments: Any) -> Result:
            return (fast if self.compiled else function)(*arguments)

        return call

    def run(self, work: Callable[[], Result]) -> Result:
        """Do `work`, which calls the functions; the first time, do it again without compiling if compiling fails.

        Before the second attempt all buffers of the modules are put back and their gradients cleared. Once a whole
        `work` has gone through, all graphs exist and errors are passed on.

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
        try:
            with torch._dynamo.config.patch(recompile_limit=_VERSIONS):  # which is looked at when compiling alone
                result = work()
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
            if self._ranks > 1:
                raise InputError(
                    f"torch.compile failed ({type(error).__name__}: {reason}): set Recipe.compile to 'off'; a C++ "
                    "compiler (CPU) or Triton (CUDA) is what usually is missing."
                ) from error
            logger.warning(
                "torch.compile FAILED and the step runs uncompiled, which is slower: %s: %s. Set Recipe.compile to "
                "'off' to train so on purpose; a C++ compiler (CPU) or Triton (CUDA) is what usually is missing.",
                type(error).__name__,
                reason,
            )
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            for module in self._modules:
                module.zero_grad(set_to_none=True)
            self.compiled = False
            return work()
        self._proven = True
        logger.info("compiled in %.0f s", time.perf_counter() - began)
        return result
