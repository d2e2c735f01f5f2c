"""torch.compile for the encoders: one graph per network and view size, or plain Python with a loud message."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from mvssl.recipe import Recipe
from pipelines.errors import InputError

logger = logging.getLogger("mvssl")
Result = TypeVar("Result")


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


class Encoders:
    """Calls modules through torch.compile as long as that works.

    Shapes are static and a graph break is an error, so each module has one graph per input size. Every convolution and
    attention of a step is in these graphs; what is outside are the small predictors, the loss and fused updates.
    """

    def __init__(self, modules: Sequence[nn.Module], *, compiled: bool, ranks: int = 1) -> None:
        self._modules = tuple(modules)
        self._ranks = ranks
        self.compiled = compiled
        self._proven = False
        self._calls: tuple[Callable[[Tensor], Tensor], ...] = (
            tuple(torch.compile(module, dynamic=False, fullgraph=True) for module in modules)
            if compiled
            else self._modules
        )

    def __call__(self, which: int, view: Tensor) -> Tensor:
        """Call module number `which` on a view [B, 3, S, S]."""
        return self._calls[which](view)

    def run(self, work: Callable[[], Result]) -> Result:
        """Do `work`, which calls the encoders; the first time, do it again without compiling if compiling fails.

        Before the second attempt all buffers of the modules are put back and their gradients cleared. Once a whole
        `work` has gone through, all graphs exist and errors are passed on.

        Raises:
            InputError: compiling fails where several ranks train: on one alone the second attempt would communicate
                what the others do not.
        """
        if not self.compiled or self._proven:
            return work()
        buffers = [buffer for module in self._modules for buffer in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            result = work()
        except torch._dynamo.exc.TorchDynamoException as error:
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
            self._calls, self.compiled = self._modules, False
            return work()
        self._proven = True
        return result
