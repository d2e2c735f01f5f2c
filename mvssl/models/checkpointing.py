"""Activation checkpointing: the blocks of a backbone keep their inputs only and are computed again in the backward."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvssl.models.batchnorm import SyncBatchNorm, ViewBatchNorm
from pipelines.runtime import InputError

_USUAL = re.compile(r"(?:\w+\.)*(?:blocks|layers?\d*)\.\d+")
"""Names of blocks in models of timm that do not list them."""


def checkpoint_blocks(backbone: nn.Module, name: str, *, random: bool) -> int:
    """Recompute the activations of a backbone's blocks in the backward, in place; the number of blocks.

    Gradients, BatchNorm statistics and random numbers are those without. Parameters, buffers and their names stay:
    only the class of a block changes. A forward without gradient, or in eval mode, is as before.

    Args:
        backbone: of timm.
        name: of the backbone, for the error.
        random: whether layers use random numbers, whose generators are then restored.

    Raises:
        InputError: the backbone has no blocks.
    """
    blocks = find_blocks(backbone)
    if not blocks:
        raise InputError(
            f"RunOptions.checkpointing is True but must be False for {name}, in which timm names no blocks: leave "
            "it out, or choose another backbone.",
            field="RunOptions.checkpointing",
        )
    for block in blocks:
        kind: Any = type(block)
        block.__class__ = _checkpointed(kind)
        block.keeps_random = random  # type: ignore[assignment]  # a plain value, not part of the state
    return len(blocks)


def find_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a model of timm, as its `group_matcher` lists them: the outermost ones with parameters."""
    matcher = getattr(backbone, "group_matcher", None)
    listed = matcher(coarse=False) if callable(matcher) else None
    patterns = [_USUAL]
    if isinstance(listed, dict):
        entries = [each for name, value in listed.items() if name != "stem" for each in _entries(value)]
        patterns = [re.compile(each) for each in entries if r"(\d+)" in each] or patterns
    found: dict[str, nn.Module] = {}
    for name, module in backbone.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        runs = type(module).forward is not nn.Module.forward  # a ModuleList only holds others
        named = runs and not inside and any(pattern.fullmatch(name) for pattern in patterns)
        if named and next(module.parameters(), None) is not None:
            found[name] = module
    return list(found.values())


def _entries(value: Any) -> list[str]:
    """The patterns of an entry of `group_matcher`: one, or several with numbers."""
    return [value] if isinstance(value, str) else [each[0] for each in value]


class Checkpointed(nn.Module):
    """Mixin for a block that is computed again in the backward.

    Attributes:
        keeps_random: whether the generators are restored for it.
    """

    keeps_random: bool

    def forward(self, *arguments: Any) -> Any:
        """As the block's own forward."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*arguments)
        if torch.compiler.is_compiling():
            # The compiler marks operations to repeat; it repeats no updates of buffers.
            return checkpoint(super().forward, *arguments, use_reentrant=False)
        again, forward = _Again(self), super().forward
        return checkpoint(
            lambda *given: forward(*map(_own, given)),
            *map(_own, arguments),
            use_reentrant=False,
            preserve_rng_state=self.keeps_random,
            context_fn=again.contexts,
        )


def _own(argument: Any) -> Any:
    """The argument; a copy of a list, which some blocks and networks change (DenseNet, HRNet)."""
    return list(argument) if isinstance(argument, list) else argument


@cache
def _checkpointed(kind: Any) -> Any:
    """The class of a block, with `Checkpointed` in front."""
    return kind if issubclass(kind, Checkpointed) else type(f"Checkpointed{kind.__name__}", (Checkpointed, kind), {})


class _Again:
    """What a block's second forward needs of the first one: its views, and the ranks that share statistics."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._views = next((module.current for module in block.modules() if isinstance(module, ViewBatchNorm)), None)
        self._state = None if self._views is None else self._views.state()
        self._shared = SyncBatchNorm.active()

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Contexts of the first and of the second forward."""
        return nullcontext(), self._second()

    @contextmanager
    def _second(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._views is not None and self._state is not None:
                stack.callback(self._views.set_state, self._views.state())
                self._views.set_state(self._state)
            if self._shared is not None:  # the backward runs outside of the forward's contexts
                stack.enter_context(self._shared)
            stack.enter_context(_copied_buffers(self._block))
            yield


@contextmanager
def _copied_buffers(block: nn.Module) -> Iterator[None]:
    """Let a block update copies of its buffers, which the first forward has updated already."""
    held: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    for module in block.modules():
        buffers = module._buffers
        for name, buffer in buffers.items():
            if buffer is not None:
                held.append((buffers, name, buffer))
    try:
        for buffers, name, buffer in held:
            buffers[name] = buffer.clone()
        yield
    finally:
        for buffers, name, buffer in held:
            buffers[name] = buffer
