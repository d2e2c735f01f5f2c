"""Which number format the forward runs in."""

from __future__ import annotations

from typing import Literal

import torch

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
