"""Triton where it is installed, so that files with device functions can be imported everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the reference backend works without
    triton, tl = None, None

__all__ = ["jit", "tl", "triton"]


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function itself, which nobody calls then."""
    return function if triton is None else triton.jit(function)
