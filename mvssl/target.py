"""The target network: an encoder without gradient that follows the online network as a moving average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mvssl.network import Encoder
from mvssl.recipe import Recipe


class TargetNetwork(Encoder):
    """Backbone and projector that no gradient reaches, without stochastic depth. Stays in train mode (SPEC section 3):
    its BatchNorm normalises with the statistics of each view, and its buffers follow its own forwards.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, drop_path=False)
        self.requires_grad_(False)

    def copy_from(self, online: nn.Module) -> None:
        """Take over the parameters and buffers of the online network's backbone and projector."""
        names = self.state_dict().keys()
        self.load_state_dict({name: value for name, value in online.state_dict().items() if name in names})


def paired_parameters(target: nn.Module, online: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The target's parameters and the online network's of the same names, in one order."""
    source = dict(online.named_parameters())
    named = list(target.named_parameters())
    return [parameter for _, parameter in named], [source[name] for name, _ in named]


@torch.no_grad()
def ema_update(target: Sequence[Tensor], online: Sequence[Tensor], decay: float) -> None:
    """Move the target: target = decay * target + (1 - decay) * online, in place, in one fused pass.

    Parameters only. To be called before the forward of the step whose decay it is (SPEC section 5).
    """
    torch._foreach_lerp_(list(target), list(online), 1.0 - decay)
