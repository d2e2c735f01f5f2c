"""torch.compile for the encoders: one graph per network and view size, or plain Python with a loud message."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

logger = logging.getLogger("mvssl")
Result = TypeVar("Result")


def wants_compile(choice: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Whether to compile; auto does on CUDA only."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


class Encoders:
    """Calls modules through torch.compile as long as that works.

    Shapes are static and a graph break is an error, so each module has one graph per input size. Every convolution and
    attention of a step is in these graphs; what is outside are the small predictors, the loss and fused updates.
    """

    def __init__(self, modules: Sequence[nn.Module], *, compiled: bool) -> None:
        self._modules = tuple(modules)
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
        """
        if not self.compiled or self._proven:
            return work()
        buffers = [buffer for module in self._modules for buffer in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            result = work()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
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
