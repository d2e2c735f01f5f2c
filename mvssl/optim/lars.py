"""LARS (You et al., arXiv 1708.03888) as PAPER.md section 5 defines it, with fused operations over all parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mvssl.models.foreach_ops import subtract_


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose update of each parameter is scaled to the parameter's norm.

    For every parameter p with gradient g::

        d = g + weight_decay * p
        q = eta * |p| / |d|           (1 where either norm is 0, or where the group is not adapted)
        buffer = momentum * buffer + q * d
        p = p - lr * buffer

    There is no host sync: norms stay tensors, and after an overflow under a GradScaler the update is made zero on the
    device.
    """

    # Makes torch.amp.GradScaler pass `found_inf` as a tensor instead of reading it on the host every step.
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
        """Every argument but `params` is a default that a parameter group may override.

        Args:
            params: parameters or group dicts.
            lr: learning rate; a schedule sets `param_groups[i]["lr"]` before each step, to a number or to a scalar
                tensor on the parameters' device.
            momentum: of the buffer.
            weight_decay: added to the gradient as weight_decay * p.
            eta: trust coefficient.
            adapt: whether to compute q; otherwise it is 1.
            stacked: whether each slot along the first dimension is a separate parameter.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        super().__init__(params, defaults | {"adapt": adapt, "stacked": stacked})

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
        """Apply the formula in place to lists of parameters, gradients and momentum buffers."""
        momentum: float | Tensor = group["momentum"]
        if self.found_inf is not None:
            # After an overflow the update is 0 and the momentum 1, which leaves the buffer unchanged.
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


def _slots(tensors: Sequence[Tensor], stacked: bool) -> list[Tensor]:
    """The tensors themselves, or if stacked [T, ...] a view of each slot."""
    return [slot for tensor in tensors for slot in tensor.unbind(0)] if stacked else list(tensors)
