"""SimSiam (Chen and He, arXiv 2011.10566): as BYOL, but the target is the online network itself, without gradient."""

from __future__ import annotations

from torch import Tensor

from mvssl.methods.cosine import cosine_similarity
from mvssl.methods.method import Method, without_settings


def pair_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Batch mean of -cos(prediction, target).

    Args:
        prediction: [B, D], any float dtype.
        target: [B, D], without gradient.

    Returns:
        A scalar, float32 (float64 for float64 input) also under autocast.
    """
    return -cosine_similarity(prediction, target).mean()


METHOD = Method(name="simsiam", make_loss=without_settings(pair_loss), target_rule="same")
