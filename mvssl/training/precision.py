"""Which number format the forward runs in."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from pipelines.errors import InputError


def autocast_dtype(precision: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device, None for plain float32. auto is bf16 on CUDA and fp32 elsewhere.

    Raises:
        InputError: fp16 without a CUDA device.
    """
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    if precision == "fp16" and device.type != "cuda":
        raise InputError(
            f"Recipe.precision is 'fp16' but must be fp32 or bf16 on a {device.type} device, where fp16 is slow and "
            "has no gradient scaler: set precision to fp32, or train on a GPU."
        )
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def check_bf16_on_cpu(backbone: nn.Module, sizes: Iterable[int]) -> None:
    """Refuse bf16 training on the CPU where a strided convolution (kernel above 1) meets a map of a single pixel.

    The weight gradient of such a convolution is uninitialised memory there (seen with torch 2.15 and oneDNN on AMX;
    float32, stride 1 and larger maps are right), so training would fail at random.

    Raises:
        InputError: a view size leads to such a map.
    """
    shadow = copy.deepcopy(backbone).to("meta").eval()
    met: list[str] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not isinstance(module, nn.Conv2d) or tuple(inputs[0].shape[2:]) != (1, 1):
            return
        if max(module.kernel_size) > 1 and max(module.stride) > 1:
            met.append(f"{module.kernel_size[0]} x {module.kernel_size[1]}")

    for module in shadow.modules():
        module.register_forward_pre_hook(look)
    for size in sorted(set(sizes)):
        with torch.no_grad():
            shadow(torch.zeros(2, 3, size, size, device="meta"))
        if met:
            raise InputError(
                f"Recipe.precision is 'bf16' but must be fp32 on the CPU for views of {size} pixels, which shrink to "
                f"one pixel before a strided {met[0]} convolution, where torch's bf16 gradients are wrong: set "
                "precision to fp32 or enlarge the view."
            )
