"""The memory format of a network's weights."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def to_memory_format(module: Module, memory_format: torch.memory_format) -> Module:
    """The module itself, its 4-dimensional parameters and buffers in this format. torch 2.11 has no type for it."""
    to: Any = module.to
    to(memory_format=memory_format)
    return module
