"""LARS (You et al., arXiv 1708.03888) as PAPER.md section 5 defines it, in fused passes over all parameters.

Which parameters are decayed, adapted and scheduled alike: told by the dimensions each has in a network of separate
layers, and by whether it belongs to the predictors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvssl.models.foreach_ops import subtract_
from mvssl.models.heads import Stacked


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


def _slots(tensors: Sequence[Tensor], stacked: bool) -> list[Tensor]:
    """Views of the parameters that count as one each: the slots of stacked tensors [T, ...]."""
    return [slot for tensor in tensors for slot in tensor.unbind(0)] if stacked else list(tensors)


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose update of each parameter p is scaled to the size of p.

    For every parameter p with gradient g::

        d = g + weight_decay * p
        q = eta * |p| / |d|           (1 where either norm is 0, or where the group is not adapted)
        buffer = momentum * buffer + q * d
        p = p - lr * buffer

    Nothing waits for the device: norms stay tensors, and a gradient that overflowed under a GradScaler leaves
    parameters and buffers as they are by arithmetic on the device.
    """

    # Asks torch.amp.GradScaler for `found_inf` as a tensor in place of a host read each step.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        adapt: bool = True,
        stacked: bool = False,
    ) -> None:
        """Make the optimiser; every argument but `params` is a default that a parameter group may set itself.

        Args:
            params: parameters or group dicts.
            lr: learning rate; set `param_groups[i]["lr"]` before each step to schedule it, to a number or to a scalar
                tensor on the parameters' device.
            momentum: of the buffer.
            weight_decay: added to the gradient as weight_decay * p.
            eta: trust coefficient.
            adapt: whether q is computed; False takes 1.
            stacked: whether slots along the first dimension are parameters of their own.
        """
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "eta": eta,
                "adapt": adapt,
                "stacked": stacked,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss to return
        """Update every parameter that has a gradient (already unscaled under a GradScaler)."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            stacked: bool = group["stacked"]
            self._update(
                _slots(params, stacked),
                _slots([p.grad for p in params], stacked),
                _slots([self.state[p]["momentum_buffer"] for p in params], stacked),
                group,
            )

    def _update(self, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
        """Apply the formula to lists of tensors of equal shapes, in place on parameters and buffers."""
        momentum: float | Tensor = group["momentum"]
        if self.found_inf is not None:
            # Overflow: the update becomes 0, the buffer is kept by a momentum of 1.
            overflow = self.found_inf > 0  # []
            grads = [torch.where(overflow, 0.0, grad) for grad in grads]
            momentum = torch.where(overflow, 1.0, group["momentum"])
        update = (
            torch._foreach_add(grads, params, alpha=group["weight_decay"])
            if group["weight_decay"]
            else torch._foreach_mul(grads, 1.0)
        )
        if group["adapt"]:
            size = torch.stack(torch._foreach_norm(params))  # [P]
            length = torch.stack(torch._foreach_norm(update))  # [P]
            trust = torch.where((size > 0) & (length > 0), group["eta"] * size / length, 1.0)
            torch._foreach_mul_(update, list(trust.unbind()))
        if self.found_inf is not None:
            torch._foreach_mul_(update, torch.where(overflow, 0.0, 1.0))
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, update)
        lr: float | Tensor = group["lr"]
        if self.found_inf is not None:
            lr = torch.where(overflow, 0.0, lr)
        if isinstance(lr, Tensor):
            subtract_(params, buffers, lr)
        else:
            torch._foreach_add_(params, buffers, alpha=-lr)
