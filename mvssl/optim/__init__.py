"""Optimisers, their parameter groups, and the schedules of their rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvssl.config.recipe import Optimizer
from mvssl.models.heads import BankLayer
from mvssl.optim.lars import LARS
from mvssl.optim.schedule import apply_rates, ema_momentum, learning_rate, rates_to_device, weight_decay

__all__ = [
    "LARS",
    "apply_rates",
    "build_optimizer",
    "ema_momentum",
    "learning_rate",
    "parameter_groups",
    "rates_to_device",
    "weight_decay",
]


def build_optimizer(network: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """The optimiser of a network's trainable parameters, which must already be on their device.

    LARS and AdamW do not decay vectors (biases, norm scales), SGD decays all parameters (PAPER.md section 5).
    `apply_rates` sets the rates of each group before every step, by its "vector", "predictor" and "decayed".
    """
    groups: list[dict[str, Any]] = []
    for group in parameter_groups(network):
        decayed = config.kind == "sgd" or not group.vector
        options: dict[str, Any] = {
            "params": list(group.parameters),
            "vector": group.vector,
            "predictor": group.predictor,
            "decayed": decayed,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        if config.kind == "lars":
            options |= {"adapt": not group.vector, "stacked": group.stacked}
        groups.append(options)
    if config.kind == "lars":
        return LARS(groups, lr=config.base_lr, momentum=config.momentum, eta=config.eta)
    if config.kind == "sgd":
        sgd = torch.optim.SGD(groups, lr=config.base_lr, momentum=config.momentum, fused=True)
        sgd.register_step_pre_hook(_zero_momentum)
        return sgd
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=config.betas, fused=True)


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters with the same rates and the same treatment.

    Attributes:
        parameters: the tensors, in the network's order.
        vector: whether they are vectors (biases, norm scales): no weight decay, no LARS adaptation.
        stacked: whether they belong to a predictor bank, where each slot along the first dimension is a parameter.
        predictor: whether they belong to `network.predictors`, whose learning rate may be constant.
    """

    parameters: tuple[Tensor, ...]
    vector: bool
    stacked: bool
    predictor: bool


def parameter_groups(network: nn.Module) -> tuple[ParameterGroup, ...]:
    """Split the trainable parameters of a network: matrices or vectors, stacked or not, of the predictors or not."""
    predictors = set(getattr(network, "predictors", nn.Module()).modules())
    members: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    for module in network.modules():
        stacked = isinstance(module, BankLayer)
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                key = (parameter.dim() - stacked < 2, stacked, module in predictors)
                members.setdefault(key, []).append(parameter)
    return tuple(
        ParameterGroup(parameters=tuple(members[key]), vector=key[0], stacked=key[1], predictor=key[2])
        for key in sorted(members)
    )


def _zero_momentum(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Allocate missing momentum buffers as zeros, so that 0.9 * 0 + g is g.

    torch allocates them with `empty_like` and relies on the first update to write them; if a GradScaler skips that
    update after an overflow, the next one would read uninitialised memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
