"""Which parameters are decayed and adapted: told by the dimensions each has in a network of separate layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mvssl.stacked import Stacked


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that an optimiser treats alike.

    Attributes:
        parameters: the tensors, in the network's order.
        vector: whether each has one dimension (biases, norm scales): no weight decay and no LARS adaptation.
        stacked: whether the first dimension counts slots of `Stacked` layers, each a parameter of its own.
    """

    parameters: tuple[Tensor, ...]
    vector: bool
    stacked: bool


def parameter_groups(network: nn.Module) -> tuple[Group, ...]:
    """Split the trainable parameters of a network into up to four groups: matrix or vector, stacked or not."""
    members: dict[tuple[bool, bool], list[Tensor]] = {}
    for module in network.modules():
        stacked = isinstance(module, Stacked)
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                members.setdefault((parameter.dim() - stacked < 2, stacked), []).append(parameter)
    return tuple(Group(parameters=tuple(members[key]), vector=key[0], stacked=key[1]) for key in sorted(members))
