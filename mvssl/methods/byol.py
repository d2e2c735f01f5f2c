"""BYOL (Grill et al., arXiv 2006.07733): regress the target's normalised embedding; the target is a moving average."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mvssl.methods.method import Method


def pair_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Batch mean of 2 - 2 cos(prediction, target).

    Args:
        prediction: [B, D], any float dtype.
        target: [B, D], without gradient.

    Returns:
        A scalar, float32 (float64 for float64 input) also under autocast.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    cosine = (F.normalize(prediction.to(dtype), dim=1) * F.normalize(target.to(dtype), dim=1)).sum(dim=1)  # [B]
    return (2 - 2 * cosine).mean()


METHOD = Method(name="byol", pair_loss=pair_loss, target_rule="ema")
