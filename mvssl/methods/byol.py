"""BYOL (Grill et al., arXiv 2006.07733): regress the target's normalised embedding; the target is a moving average."""

from __future__ import annotations

from torch import Tensor

from mvssl.methods.cosine import cosine_similarity
from mvssl.methods.method import Method, without_settings


def pair_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Batch mean of 2 - 2 cos(prediction, target).

    Args:
        prediction: [B, D], any float dtype.
        target: [B, D], without gradient.

    Returns:
        A scalar, float32 (float64 for float64 input) also under autocast.
    """
    return (2 - 2 * cosine_similarity(prediction, target)).mean()


METHOD = Method(name="byol", make_loss=without_settings(pair_loss), target_rule="ema")
