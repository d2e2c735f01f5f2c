"""The MLP head, and a bank of T such heads that all views pass through together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mvssl.networks.grouped_batchnorm import Grouped
from mvssl.networks.stacked import StackedBatchNorm, StackedLayerNorm, StackedLinear
from mvssl.recipe import Head
from pipelines.errors import InputError


def _norm(head: Head, features: int, *, affine: bool = True) -> nn.Module:
    """The norm of a head's layer, of vectors [B, features]."""
    if head.norm == "layer":
        return nn.LayerNorm(features, elementwise_affine=affine)
    return nn.BatchNorm1d(features, affine=affine)


def _stacked_norm(head: Head, tasks: int, features: int, *, affine: bool = True) -> nn.Module:
    """T norms of a head's layer, of stacked vectors [V, B, features]."""
    if head.norm == "layer":
        return StackedLayerNorm(tasks, features, affine=affine)
    return StackedBatchNorm(tasks, features, affine=affine)


class MLP(nn.Sequential):
    """Linear (no bias), norm, ReLU for every hidden layer; then Linear with bias; optionally a norm without affine.

    Maps [B, in] to [B, out]. Source of the shape: SPEC section 3 (arXiv 2602.05845), whose norm is BatchNorm1d.
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
        """Map [B, in] to [B, out]; compiled, norm and ReLU are one function."""
        x, layers, done = input, list(self), False
        fuses = self.training and torch.compiler.is_compiling()
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if done:  # this ReLU
                done = False
            elif fuses and isinstance(layer, Grouped) and isinstance(following, nn.ReLU):
                x, done = layer.normalise(x, relu=True), True
            else:
                x = layer(x)
        return x


class PredictorBank(nn.Module):
    """T MLPs of one shape with stacked weights: every view goes through its task's MLP, all in one batched product.

    Equal to T separate `MLP`s called view by view: outputs, gradients and running statistics.

    Attributes:
        tasks: the keys, slot t belongs to tasks[t].
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
                StackedLinear(len(tasks), width, hidden, bias=False),
                _stacked_norm(head, len(tasks), hidden),
                nn.ReLU(inplace=True),
            ]
            width = hidden
        layers.append(StackedLinear(len(tasks), width, head.out, bias=True))
        if head.output_norm:
            layers.append(_stacked_norm(head, len(tasks), head.out, affine=False))
        self.layers = nn.ModuleList(layers)

    def forward(self, z: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Predict from embeddings.

        Args:
            z: [V, B, in], the embeddings of V views.
            slots: the slot each view goes through, V numbers below T.

        Returns:
            [V, B, out].
        """
        for layer in self.layers:
            z = layer(z) if isinstance(layer, nn.ReLU) else layer(z, slots)
        return z

    @torch.no_grad()
    def to_mlps(self) -> dict[str, MLP]:
        """The same predictors as separate MLPs by task, parameters and buffers copied."""
        mlps: dict[str, MLP] = {}
        for slot, task in enumerate(self.tasks):
            mlp = MLP(self.in_features, self.head).to(next(self.parameters()))
            for stacked, single in zip(self.layers, mlp, strict=True):
                theirs = single.state_dict(keep_vars=True)
                for name, tensor in stacked.state_dict().items():
                    theirs[name].copy_(tensor[slot].t() if tensor.dim() == 3 else tensor[slot])
            mlps[task] = mlp.train(self.training)
        return mlps

    @classmethod
    @torch.no_grad()
    def from_mlps(cls, mlps: Mapping[str, MLP]) -> PredictorBank:
        """A bank that equals the given MLPs, parameters and buffers copied; slots in the mapping's order.

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
