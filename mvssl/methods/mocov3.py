"""MoCo v3 (Chen et al., arXiv 2104.02057): tell the own image's target from those of all other images of the step."""

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
    """InfoNCE times 2 * temperature (algorithm 1 of arXiv 2104.02057), batch mean.

    Args:
        prediction: [B, D], any float dtype.
        keys: [N, D] with N of B or more, without gradient; key n < B is of the image of prediction n.
        temperature: divides the cosines.

    Returns:
        A scalar, float32 (float64 for float64 input) also under autocast.
    """
    with torch.autocast(prediction.device.type, enabled=False):  # or the product would be in half precision
        logits = unit_rows(prediction) @ unit_rows(keys).T / temperature  # [B, N]
        own = torch.arange(len(prediction), device=prediction.device)  # [B]
        return F.cross_entropy(logits, own) * (2 * temperature)


def make_loss(recipe: Recipe) -> PairLoss:
    """The loss with the recipe's temperature.

    Raises:
        InputError: the recipe has none.
    """
    if recipe.temperature is None:
        raise invalid("Recipe.temperature", None, "above 0 for mocov3", "set it to 1.0, as in the paper")
    return partial(pair_loss, temperature=recipe.temperature)


METHOD = Method(name="mocov3", make_loss=make_loss, target_rule="ema", keys="all")
