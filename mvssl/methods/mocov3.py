"""MoCo v3 (Chen et al., arXiv 2104.02057): InfoNCE with in-batch negatives from all ranks."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mvssl.config.recipe import Recipe
from mvssl.methods.cosine import unit_rows
from mvssl.methods.method import Method, PairLoss
from pipelines.runtime import invalid


def pair_loss(prediction: Tensor, keys: Tensor, *, temperature: float) -> Tensor:
    """Batch mean of InfoNCE times 2 * temperature (algorithm 1 of arXiv 2104.02057), a scalar in float32 or float64.

    Args:
        prediction: [B, D].
        keys: [N, D], N >= B, without gradient; key n < B is the positive of prediction n.
        temperature: divides the cosine similarities.
    """
    with torch.autocast(prediction.device.type, enabled=False):  # which would run the product in half precision
        logits = unit_rows(prediction) @ unit_rows(keys).T / temperature  # [B, N]
        positives = torch.arange(len(prediction), device=prediction.device)  # [B]
        return F.cross_entropy(logits, positives) * (2 * temperature)


def make_loss(recipe: Recipe) -> PairLoss:
    """The loss with the recipe's temperature; InputError if it has none."""
    if recipe.temperature is None:
        raise invalid("Recipe.temperature", None, "above 0 for mocov3", "set it to 1.0, as in the paper")
    return partial(pair_loss, temperature=recipe.temperature)


METHOD = Method(name="mocov3", make_loss=make_loss, target_rule="ema", keys="all")
