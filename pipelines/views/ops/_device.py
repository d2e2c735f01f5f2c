"""Small numbers from the host to the device, without the host waiting for the device's queue."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; to a GPU by way of pinned memory, in the current stream's order."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned block until it is copied


@cache
def channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """One constant per channel, [3, 1, 1]; made once per device and dtype, not to be written to."""
    with torch.inference_mode(False):  # or a first use in inference mode would bar it from autograd for ever
        return torch.tensor(values, device=device, dtype=dtype)[:, None, None]
