"""What a method is: the loss of one pair, and the rule by which the target network follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mvssl.config.recipe import Recipe
from pipelines.runtime import invalid

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""Prediction [B, D] and target [N, D] (without gradient) to a scalar, in float32 or better. Target n < B is the one of
prediction n; N is B, or the images of all ranks for methods with `keys` "all"."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A self-supervised method. A module of `mvssl.methods` that defines `METHOD` is found by its name.

    Attributes:
        name: the name used in recipes.
        make_loss: the pair loss of a recipe; raises InputError where the recipe does not fit the method.
        target_rule: ema: the target network is a moving average of the online network, with BatchNorm buffers of its
            own; same: it is the online network of this step, parameters and buffers.
        keys: own: a prediction meets its own image's target alone; all: also those of all other images of the step, of
            all ranks.
    """

    name: str
    make_loss: Callable[[Recipe], PairLoss]
    target_rule: Literal["ema", "same"]
    keys: Literal["own", "all"] = "own"


def without_settings(pair_loss: PairLoss) -> Callable[[Recipe], PairLoss]:
    """`make_loss` of a method that has no temperature."""

    def make(recipe: Recipe) -> PairLoss:
        if recipe.temperature is not None:
            raise invalid(
                "Recipe.temperature", recipe.temperature, f"None for {recipe.method}, which has none", "leave it out"
            )
        return pair_loss

    return make
