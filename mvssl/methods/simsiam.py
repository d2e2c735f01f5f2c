"""SimSiam (Chen and He, arXiv 2011.10566): regress the embedding of the online network itself, without gradient."""

from __future__ import annotations

from torch import Tensor

from mvssl.methods.cosine import cosine_similarity
from mvssl.methods.method import Method, without_settings


def pair_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Batch mean of -cos(prediction, target). over two [B, D], a scalar in float32 or float64."""
    return -cosine_similarity(prediction, target).mean()


METHOD = Method(name="simsiam", make_loss=without_settings(pair_loss), target_rule="same")
