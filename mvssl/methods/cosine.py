"""Cosine similarity in float32 or float64, also under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x [N, D] scaled to length 1, in float32 (float64 for float64 input)."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def cosine_similarity(prediction: Tensor, target: Tensor) -> Tensor:
    """Row-wise cosine similarity of two [B, D]: [B]."""
    return (unit_rows(prediction) * unit_rows(target)).sum(dim=1)
