"""Which parameters are decayed, adapted and scheduled alike: told by the dimensions each has in a network of separate
layers, and by whether it belongs to the predictors.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mvssl.networks.stacked import Stacked


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that an optimiser treats alike.

    Attributes:
        parameters: the tensors, in the network's order.
        vector: whether each has one dimension (biases, norm scales): no weight decay and no LARS adaptation.
        stacked: whether the first dimension counts slots of `Stacked` layers, each a parameter of its own.
        predictor: whether they belong to the network's `predictors`, whose learning rate may be constant.
    """

    parameters: tuple[Tensor, ...]
    vector: bool
    stacked: bool
    predictor: bool


def parameter_groups(network: nn.Module) -> tuple[Group, ...]:
    """Split the trainable parameters of a network: matrix or vector, stacked or not, of the predictors or not.

    Frozen parameters (`requires_grad` False) are in no group. Predictors are those of `network.predictors`, if any.
    """
    predictors = set(getattr(network, "predictors", nn.Module()).modules())
    members: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    for module in network.modules():
        stacked = isinstance(module, Stacked)
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                key = (parameter.dim() - stacked < 2, stacked, module in predictors)
                members.setdefault(key, []).append(parameter)
    return tuple(
        Group(parameters=tuple(members[key]), vector=key[0], stacked=key[1], predictor=key[2])
        for key in sorted(members)
    )
