"""LARS against its formula with Python scalars, and AdamW and SGD groups against theirs."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvssl.config.recipe import Optimizer
from mvssl.models.heads import BankBatchNorm, BankLinear
from mvssl.optim import LARS, apply_rates, build_optimizer, parameter_groups


class Net(nn.Module):
    """One parameter of every kind: convolution, vectors, stacked matrix, stacked vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.stacked = BankLinear(3, 4, 5, bias=True)
        self.stacked_norm = BankBatchNorm(3, 5)


def formula(p: list[float], g: list[float], m: list[float], lr: float, wd: float, eta: float, adapt: bool) -> None:
    """One LARS update of one parameter, in place on lists of numbers."""
    d = [gi + wd * pi for gi, pi in zip(g, p, strict=True)]
    q = 1.0
    if adapt:
        size, length = math.sqrt(sum(x * x for x in p)), math.sqrt(sum(x * x for x in d))
        q = eta * size / length if size > 0 and length > 0 else 1.0
    for i, di in enumerate(d):
        m[i] = 0.9 * m[i] + q * di
        p[i] -= lr * m[i]


def test_lars_equals_formula() -> None:
    net: Any = Net().double()
    config = Optimizer(kind="lars", weight_decay=0.01, eta=0.02)
    optimizer = build_optimizer(net, config)
    # (tensor of ours, slot or None, whether it is a matrix in a network of separate layers)
    units: list[tuple[nn.Parameter, int | None, bool]] = [
        (net.conv.weight, None, True),
        (net.conv.bias, None, False),
        (net.norm.weight, None, False),
        (net.norm.bias, None, False),
        *((net.stacked.weight, slot, True) for slot in range(3)),
        *((net.stacked.bias, slot, False) for slot in range(3)),
        *((net.stacked_norm.weight, slot, False) for slot in range(3)),
        *((net.stacked_norm.bias, slot, False) for slot in range(3)),
    ]

    def values(tensor: Any, slot: int | None) -> list[float]:
        numbers: list[float] = (tensor if slot is None else tensor[slot]).detach().flatten().tolist()
        return numbers

    with torch.no_grad():
        net.stacked.weight[1].zero_()  # |p| = 0: not adapted
    expected = [values(p, slot) for p, slot, _ in units]
    momenta = [[0.0] * len(numbers) for numbers in expected]
    torch.manual_seed(0)
    for lr in (0.5, 0.1, 2.0):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        net.stacked.weight.grad[1] = 0.0  # and |g + wd p| = 0
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for (p, slot, matrix), numbers, momentum in zip(units, expected, momenta, strict=True):
            formula(numbers, values(p.grad, slot), momentum, lr, 0.01 if matrix else 0.0, 0.02, matrix)
            assert values(p, slot) == pytest.approx(numbers, rel=1e-12, abs=1e-14)


def test_lars_equals_formula_with_the_rates_of_each_group() -> None:
    net: Any = nn.Module()
    net.encoder = nn.Linear(3, 4)
    net.predictors = BankLinear(2, 4, 3, bias=True)
    net.double()
    config = Optimizer(
        kind="lars",
        base_lr=0.5,
        bias_lr=0.2,
        constant_predictor_lr=True,
        weight_decay=0.01,
        weight_decay_end=0.05,
        eta=0.02,
        warmup_epochs=0.0,
        final_lr_factor=0.0,
    )
    optimizer = build_optimizer(net, config)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    # (parameter, its gradient, whether a matrix, whether a predictor's); slots are views of the stacked tensors
    units: list[tuple[Tensor, Tensor, bool, bool]] = [
        (net.encoder.weight.detach(), net.encoder.weight.grad, True, False),
        (net.encoder.bias.detach(), net.encoder.bias.grad, False, False),
        *((net.predictors.weight.detach()[slot], net.predictors.weight.grad[slot], True, True) for slot in range(2)),
        *((net.predictors.bias.detach()[slot], net.predictors.bias.grad[slot], False, True) for slot in range(2)),
    ]
    expected = [p.flatten().tolist() for p, *_ in units]
    momenta = [[0.0] * len(numbers) for numbers in expected]
    torch.manual_seed(0)
    # 4 steps at a batch of 256; q = (1 + cos(pi k / 4)) / 2 worked out by hand.
    for step, q in enumerate((1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4)):
        for p in net.parameters():
            p.grad.normal_()
        apply_rates(optimizer, config, batch_size=256, step=step, steps=4, steps_per_epoch=2)
        optimizer.step()
        for (weight, grad, matrix, predictor), numbers, momentum in zip(units, expected, momenta, strict=True):
            lr = 0.5 if predictor else q * (0.5 if matrix else 0.2)
            wd = 0.05 - 0.04 * q if matrix else 0.0
            formula(numbers, grad.flatten().tolist(), momentum, lr, wd, 0.02, matrix)
            assert weight.flatten().tolist() == pytest.approx(numbers, rel=1e-12, abs=1e-14)


def test_overflowed_gradient_changes_nothing() -> None:
    net = Net()
    optimizer = build_optimizer(net, Optimizer(kind="lars", weight_decay=0.01))
    assert isinstance(optimizer, LARS)

    def update(found_inf: float, fill: float) -> None:
        for p in net.parameters():
            p.grad = torch.full_like(p, fill)
        optimizer.found_inf = torch.tensor(found_inf)  # as torch.amp.GradScaler sets it
        optimizer.step()
        optimizer.found_inf = None

    update(0.0, 0.3)
    before = [p.clone() for p in net.parameters()]
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()]
    update(1.0, math.inf)
    update(1.0, math.nan)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    for p, old in zip(net.parameters(), buffers, strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], old)

    twin = Net()
    twin.load_state_dict(net.state_dict())
    other = build_optimizer(twin, Optimizer(kind="lars", weight_decay=0.01))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    update(0.0, 0.1)
    for p in twin.parameters():
        p.grad = torch.full_like(p, 0.1)
    other.step()  # without a scaler
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_groups_tell_matrices_from_vectors() -> None:
    net = Net()
    net.norm.weight.requires_grad_(False)
    groups = parameter_groups(net)
    assert not any(group.predictor for group in groups)  # the network has none
    found = {id(p): (group.vector, group.stacked) for group in groups for p in group.parameters}
    assert found == {
        id(net.conv.weight): (False, False),
        id(net.conv.bias): (True, False),
        id(net.norm.bias): (True, False),
        id(net.stacked.weight): (False, True),
        id(net.stacked.bias): (True, True),
        id(net.stacked_norm.weight): (True, True),
        id(net.stacked_norm.bias): (True, True),
    }


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_weight_decay_of_adamw_and_sgd(kind: Any) -> None:
    net: Any = Net().double()
    optimizer = build_optimizer(net, Optimizer(kind=kind, weight_decay=0.1, base_lr=0.01, betas=(0.8, 0.95)))
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        old, matrix = before[name], name in ("conv.weight", "stacked.weight")
        if kind == "sgd":
            expected = old - 0.01 * (p.grad + 0.1 * old)
        else:  # first step: both moments are bias-corrected to the gradient and its square
            expected = old * (1 - 0.01 * 0.1 if matrix else 1) - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)
