"""The target network: an encoder without gradient that follows the online network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvssl.networks.encoder import Encoder
from mvssl.optim.scaled import lerp_
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


class Follow:
    """Moves a target network behind its online network."""

    def __init__(self, target: nn.Module, online: nn.Module) -> None:
        parameters, buffers = dict(online.named_parameters()), dict(online.named_buffers())
        self._parameters: list[Tensor] = [p for _, p in target.named_parameters()]
        self._online_parameters: list[Tensor] = [parameters[name] for name, _ in target.named_parameters()]
        self._buffers = [b for _, b in target.named_buffers()]
        self._online_buffers = [buffers[name] for name, _ in target.named_buffers()]

    def average(self, pace: Tensor) -> None:
        """The moving average of SPEC section 5: parameters only; to be called before the forward of the step.

        target = decay * target + (1 - decay) * online; `pace` is 1 - decay, a scalar on the networks' device: near the
        end of a run a decay would not hold it in float32.
        """
        lerp_(self._parameters, self._online_parameters, pace)

    @torch.no_grad()
    def copy(self) -> None:
        """Make the target the online network of this step, parameters and buffers (SPEC section 3, SimSiam)."""
        torch._foreach_copy_(self._parameters, self._online_parameters)
        if self._buffers:  # networks without BatchNorm have none, which torch refuses
            torch._foreach_copy_(self._buffers, self._online_buffers)
