"""BYOL (Grill et al., arXiv 2006.07733): regress the normalised embedding of an EMA target network."""

from __future__ import annotations

from torch import Tensor

from mvssl.methods.cosine import cosine_similarity
from mvssl.methods.method import Method, without_settings


def pair_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Batch mean of 2 - 2 cos(prediction, target). over two [B, D], a scalar in float32 or float64."""
    return (2 - 2 * cosine_similarity(prediction, target)).mean()


METHOD = Method(name="byol", make_loss=without_settings(pair_loss), target_rule="ema")
