"""Layers that hold T equal layers as one stacked tensor each, so that all views pass in one batched product."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _rows(stack: Tensor, slots: tuple[int, ...]) -> Tensor:
    """Select slots of a stack [T, ...] as [V, ...] without an index tensor (which would wait for the device)."""
    if slots == tuple(range(stack.shape[0])):
        return stack
    rows = stack.unbind(0)
    return torch.stack([rows[slot] for slot in slots])


class Stacked(nn.Module):
    """Base of layers whose own parameters have a leading dimension T: slot t is a layer of its own.

    Optimisers must treat each slot as a separate parameter (`mvssl.optim.groups`): a bias [T, out] is T vectors, and
    LARS adapts to the norm of each slot's weight.
    """


class StackedLinear(Stacked):
    """T linear layers as one.

    Attributes:
        weight: [T, in, out], each slot the transpose of an nn.Linear's weight.
        bias: [T, out], or None.
    """

    def __init__(self, tasks: int, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tasks, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(tasks, out_features)) if bias else None
        bound = 1 / math.sqrt(in_features)  # what nn.Linear draws: uniform within 1 / sqrt(in), weight and bias
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Map x [V, B, in] to [V, B, out]; view v goes through slot `slots[v]`."""
        product = torch.bmm(x, _rows(self.weight, slots))  # [V, B, out]
        if self.bias is None:
            return product
        return product + _rows(self.bias, slots).unsqueeze(1).to(product.dtype)


class StackedBatchNorm(Stacked):
    """T BatchNorm1d layers as one. In training each view is normalised over its own B samples.

    Attributes:
        weight, bias: [T, C], or None without `affine`.
        running_mean, running_var: [T, C]; num_batches_tracked: int64 [T].
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, tasks: int, features: int, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(tasks, features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(tasks, features)) if affine else None
        self.eps, self.momentum = 1e-5, 0.1  # nn.BatchNorm1d's
        self.register_buffer("running_mean", torch.zeros(tasks, features))
        self.register_buffer("running_var", torch.ones(tasks, features))
        self.register_buffer("num_batches_tracked", torch.zeros(tasks, dtype=torch.int64))

    def forward(self, x: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Normalise x [V, B, C]; view v uses slot `slots[v]`.

        In training the running statistics become what T separate layers called view by view, in order, would have.
        """
        views, batch, features = x.shape
        if self.training:
            # With momentum 1, the normalisation leaves the statistics of this batch in the buffers given to it.
            mean = self.running_mean.new_zeros(views * features)
            var = self.running_var.new_zeros(views * features)
        else:
            mean = _rows(self.running_mean, slots).reshape(-1)  # [V * C]
            var = _rows(self.running_var, slots).reshape(-1)
        flat = F.batch_norm(
            x.transpose(0, 1).reshape(batch, views * features),
            mean,
            var,
            None if self.weight is None else _rows(self.weight, slots).reshape(-1),
            None if self.bias is None else _rows(self.bias, slots).reshape(-1),
            training=self.training,
            momentum=1.0,
            eps=self.eps,
        )  # [B, V * C]
        if self.training:
            self._track(mean.view(views, features), var.view(views, features), slots)
        return flat.view(batch, views, features).transpose(0, 1)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, slots: tuple[int, ...]) -> None:
        """Move the running statistics of each view's slot towards the batch's [V, C], in the order of the views."""
        for view, slot in enumerate(slots):
            self.running_mean[slot].lerp_(mean[view], self.momentum)
            self.running_var[slot].lerp_(var[view], self.momentum)
            self.num_batches_tracked[slot] += 1
