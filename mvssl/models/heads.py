"""The heads: the projector is an MLP; the predictors are a bank of T MLPs, evaluated in one batched product."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvssl.config.recipe import Head
from mvssl.models.batchnorm import ViewBatchNorm
from pipelines.runtime import InputError


class MLP(nn.Sequential):
    """Linear (no bias), norm, ReLU for every hidden layer; then Linear with bias; optionally a norm without affine.

    Maps [B, in] to [B, out]. Source of the shape: PAPER.md section 3 (arXiv 2602.05845), whose norm is BatchNorm1d.
    """

    def __init__(self, in_features: int, head: Head) -> None:
        layers: list[nn.Module] = []
        width = in_features
        for hidden in head.hidden:
            layers += [nn.Linear(width, hidden, bias=False), _norm(head, hidden), nn.ReLU(inplace=True)]
            width = hidden
        layers.append(nn.Linear(width, head.out))
        if head.output_norm:
            layers.append(_norm(head, head.out, affine=False))
        super().__init__(*layers)
        self.in_features = in_features
        self.head = head

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, in] to [B, out]; when compiled, norm and ReLU are one function."""
        x, layers, fused = input, list(self), False
        fuse = self.training and torch.compiler.is_compiling()
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if fused:  # this ReLU was part of the norm
                fused = False
            elif fuse and isinstance(layer, ViewBatchNorm) and isinstance(following, nn.ReLU):
                x, fused = layer.normalise(x, relu=True), True
            else:
                x = layer(x)
        return x


def _norm(head: Head, features: int, *, affine: bool = True) -> nn.Module:
    """Normalisation of vectors [B, features]."""
    if head.norm == "layer":
        return nn.LayerNorm(features, elementwise_affine=affine)
    return nn.BatchNorm1d(features, affine=affine)


class PredictorBank(nn.Module):
    """T MLPs of one shape, one per task: each view passes through its task's MLP, all views in one batched product.

    Outputs, gradients and running statistics equal those of T separate `MLP`s called view by view.

    Attributes:
        tasks: tasks[t] uses slot t.
    """

    def __init__(self, tasks: tuple[str, ...], in_features: int, head: Head) -> None:
        super().__init__()
        self.tasks = tasks
        self.in_features = in_features
        self.head = head
        layers: list[nn.Module] = []
        width = in_features
        for hidden in head.hidden:
            layers += [
                BankLinear(len(tasks), width, hidden, bias=False),
                _bank_norm(head, len(tasks), hidden),
                nn.ReLU(inplace=True),
            ]
            width = hidden
        layers.append(BankLinear(len(tasks), width, head.out, bias=True))
        if head.output_norm:
            layers.append(_bank_norm(head, len(tasks), head.out, affine=False))
        self.layers = nn.ModuleList(layers)

    def forward(self, z: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Predict from embeddings.

        Args:
            z: [V, B, in], embeddings of V views.
            slots: of each view.

        Returns:
            [V, B, out].
        """
        for layer in self.layers:
            z = layer(z) if isinstance(layer, nn.ReLU) else layer(z, slots)
        return z

    @torch.no_grad()
    def to_mlps(self) -> dict[str, MLP]:
        """Separate MLPs by task, with copies of parameters and buffers."""
        mlps: dict[str, MLP] = {}
        for slot, task in enumerate(self.tasks):
            mlp = MLP(self.in_features, self.head).to(next(self.parameters()))
            for layer, single in zip(self.layers, mlp, strict=True):
                state = single.state_dict(keep_vars=True)
                for name, tensor in layer.state_dict().items():
                    state[name].copy_(tensor[slot].t() if tensor.dim() == 3 else tensor[slot])
            mlps[task] = mlp.train(self.training)
        return mlps

    @classmethod
    @torch.no_grad()
    def from_mlps(cls, mlps: Mapping[str, MLP]) -> PredictorBank:
        """A bank with copies of the parameters and buffers of these MLPs; slots in the mapping's order.

        Raises:
            InputError: there is no MLP, or their shapes differ.
        """
        shapes = {(mlp.in_features, mlp.head) for mlp in mlps.values()}
        if len(shapes) != 1:
            raise InputError(
                f"PredictorBank.from_mlps got {len(mlps)} predictors of {len(shapes)} shapes but must get one or more "
                "of one shape: build them all from the same Head and input width."
            )
        first = next(iter(mlps.values()))
        bank = cls(tuple(mlps), first.in_features, first.head).to(next(first.parameters()))
        for index, layer in enumerate(bank.layers):
            for name, tensor in layer.state_dict(keep_vars=True).items():
                singles = [mlp[index].state_dict()[name] for mlp in mlps.values()]
                tensor.copy_(torch.stack([single.t() if single.dim() == 2 else single for single in singles]))
        return bank.train(first.training)


class BankLayer(nn.Module):
    """Base of layers of a bank: T equal layers with parameters stacked along the first dimension; slot t is one layer.

    Optimisers treat each slot as a separate parameter (`mvssl.optim`): a bias [T, out] is T vectors, and LARS adapts to
    the norm of each slot's weight.
    """


class BankLinear(BankLayer):
    """T linear layers.

    Attributes:
        weight: [T, in, out], each slot the transpose of an nn.Linear's weight.
        bias: [T, out], or None.
    """

    def __init__(self, tasks: int, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tasks, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(tasks, out_features)) if bias else None
        bound = 1 / math.sqrt(in_features)  # as nn.Linear: uniform within 1 / sqrt(in)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Map x [V, B, in] to [V, B, out]; view v goes through slot `slots[v]`."""
        product = torch.bmm(x, _select(self.weight, slots))  # [V, B, out]
        if self.bias is None:
            return product
        return product + _select(self.bias, slots).unsqueeze(1).to(product.dtype)


class BankBatchNorm(BankLayer):
    """T BatchNorm1d layers. In training each view is normalised over its own B samples.

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

        In training the running statistics are those of T separate layers called view by view, in order.
        """
        weight = None if self.weight is None else _select(self.weight, slots)
        bias = None if self.bias is None else _select(self.bias, slots)
        if not self.training:
            mean, var = _select(self.running_mean, slots), _select(self.running_var, slots)
            return self._batch_norm(x, mean, var, weight, bias)
        # With momentum 1 the call overwrites these buffers with the mean and unbiased variance of each view, [V, C].
        mean = self.running_mean.new_zeros(x.shape[0], x.shape[2])
        var = torch.zeros_like(mean)
        y = self._batch_norm(x, mean, var, weight, bias)
        self._track(mean, var, slots)
        return y

    def _batch_norm(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """BatchNorm of V * C features in one call; writes mean and var [V, C] in training and reads them in eval."""
        views, batch, features = x.shape
        flat = F.batch_norm(
            x.transpose(0, 1).reshape(batch, views * features),
            mean.view(-1),
            var.view(-1),
            None if weight is None else weight.view(-1),
            None if bias is None else bias.view(-1),
            training=self.training,
            momentum=1.0,
            eps=self.eps,
        )  # [B, V * C]
        return flat.view(batch, views, features).transpose(0, 1)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, slots: tuple[int, ...]) -> None:
        """Update each view's slot of the running statistics from batch statistics [V, C], in the order of the views."""
        for view, slot in enumerate(slots):
            self.running_mean[slot].lerp_(mean[view], self.momentum)
            self.running_var[slot].lerp_(var[view], self.momentum)
            self.num_batches_tracked[slot] += 1


class BankLayerNorm(BankLayer):
    """T LayerNorm layers: each sample is normalised over its own C features.

    Attributes:
        weight, bias: [T, C], or None without `affine`.
    """

    def __init__(self, tasks: int, features: int, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(tasks, features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(tasks, features)) if affine else None
        self.eps = 1e-5  # nn.LayerNorm's

    def forward(self, x: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Normalise x [V, B, C] over C, then scale and shift view v by slot `slots[v]`."""
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        if self.weight is None or self.bias is None:
            return y
        weight, bias = _select(self.weight, slots).unsqueeze(1), _select(self.bias, slots).unsqueeze(1)  # [V, 1, C]
        return y * weight.to(y.dtype) + bias.to(y.dtype)


def _bank_norm(head: Head, tasks: int, features: int, *, affine: bool = True) -> nn.Module:
    """T norms of vectors [V, B, features]."""
    if head.norm == "layer":
        return BankLayerNorm(tasks, features, affine=affine)
    return BankBatchNorm(tasks, features, affine=affine)


def _select(tensor: Tensor, slots: tuple[int, ...]) -> Tensor:
    """Select slots of [T, ...] as [V, ...]; an index tensor would cause a host sync."""
    if slots == tuple(range(tensor.shape[0])):
        return tensor
    rows = tensor.unbind(0)
    return torch.stack([rows[slot] for slot in slots])
