"""What a method is: the loss of one pair, and the rule by which the target network follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Method:
    """A self-supervised method. A module of `mvssl.methods` that defines `METHOD` is found by its name.

    Attributes:
        name: the name used in recipes.
        pair_loss: prediction [B, D] and target [B, D] (without gradient) to a scalar, in float32 or better.
        target_rule: ema: the target network is a moving average of the online network.
    """

    name: str
    pair_loss: Callable[[Tensor, Tensor], Tensor]
    target_rule: Literal["ema"]
