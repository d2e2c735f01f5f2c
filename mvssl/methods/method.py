"""The definition of a method: the loss of a (prediction, target) pair and the update rule of the target network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mvssl.config.recipe import Recipe
from pipelines.runtime import invalid

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""Maps prediction [B, D] and targets [N, D] (without gradient) to a scalar, in float32 or float64. Target n < B belongs
to prediction n. N is B, or with in-batch negatives (`Method.keys` "all") the images of the step on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A self-supervised method. A module of `mvssl.methods` that defines `METHOD` is found by its name.

    Attributes:
        name: the name used in recipes.
        make_loss: builds the pair loss for a recipe; raises InputError if the recipe does not fit the method.
        target_rule: ema: the target network is an exponential moving average of the online network, with its own
            BatchNorm buffers; same: it equals the online network of this step, parameters and buffers.
        keys: own: a prediction is compared with its own image's target only; all: in-batch negatives, the targets of
            all images of the step on all ranks.
    """

    name: str
    make_loss: Callable[[Recipe], PairLoss]
    target_rule: Literal["ema", "same"]
    keys: Literal["own", "all"] = "own"


def without_settings(pair_loss: PairLoss) -> Callable[[Recipe], PairLoss]:
    """`make_loss` of a method without temperature."""

    def make(recipe: Recipe) -> PairLoss:
        if recipe.temperature is not None:
            raise invalid(
                "Recipe.temperature", recipe.temperature, f"None for {recipe.method}, which has none", "leave it out"
            )
        return pair_loss

    return make
