"""Solarize: values at or above the threshold are inverted."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.views.randomness import Slot
from pipelines.views.reference.device import jit, tl, update
from pipelines.views.spec import ViewSpec


def sample(spec: ViewSpec, u: Tensor) -> Tensor:
    """Which images of one view are solarized, from u float64 [blocks, 4, N]: bool [N]."""
    return u[Slot.SOLARIZE, 0] < spec.solarize


def apply(images: Tensor, solarize: Tensor, threshold: float) -> Tensor:
    """Solarize where solarize (bool [N] on the CPU): float32 [N, 3, S, S] in [0, 1] to the same; may overwrite."""
    return update(images, solarize, lambda chosen: torch.where(chosen >= threshold, 1.0 - chosen, chosen))


@jit
def solarize_device(value: tl.tensor, solarize: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """As `apply`, for one channel of pixels of one image; `solarize` is 0 or 1."""
    if solarize != 0:
        value = tl.where(value >= threshold, 1.0 - value, value)
    return value
