"""Rates of every parameter group against tables computed by hand: 10 epochs of 4 steps, batch size 512."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from mvssl.config.recipe import Head, Optimizer
from mvssl.models.heads import MLP, PredictorBank
from mvssl.optim import apply_rates, build_optimizer, parameter_groups, weight_decay

KINDS = ("lars", "sgd", "adamw")
# (1 + cos(pi k / 8)) / 2 for k = 0 to 8, from the half-angle formulas: cos(pi / 8) = sqrt(2 + sqrt(2)) / 2.
COSINE = (1.0, 0.9619397662556434, 0.8535533905932737, 0.6913417161825449, 0.5, 0.3086582838174551, 0.1464466094067263)


class Net(nn.Module):
    """An encoder with matrices and vectors, and a bank of two predictors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.projector = MLP(4, Head(hidden=(5,), out=6))
        self.predictors = PredictorBank(("global", "local"), 6, Head(hidden=(7,), out=6))


def config_of(kind: Any, **changes: Any) -> Optimizer:
    defaults: dict[str, Any] = {"base_lr": 0.5, "weight_decay": 0.04, "warmup_epochs": 2.0, "final_lr_factor": 0.0}
    return Optimizer(kind=kind, **(defaults | changes))


def rates_at(net: nn.Module, config: Optimizer, step: int) -> tuple[float, dict[str, tuple[float, float]]]:
    """The returned rate, and (learning rate, weight decay) of each parameter at a step, by name."""
    optimizer = build_optimizer(net, config)
    main = apply_rates(optimizer, config, batch_size=512, step=step, steps=40, steps_per_epoch=4)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    return main, {name: found[id(p)] for name, p in net.named_parameters() if id(p) in found}


MATRICES = ("stem.weight", "projector.0.weight", "projector.3.weight")
VECTORS = ("stem.bias", "norm.weight", "norm.bias", "projector.1.weight", "projector.1.bias", "projector.3.bias")
PREDICTOR_MATRICES = ("predictors.layers.0.weight", "predictors.layers.3.weight")
PREDICTOR_VECTORS = ("predictors.layers.1.weight", "predictors.layers.1.bias", "predictors.layers.3.bias")


def test_the_lists_of_names_are_complete() -> None:
    names = {name for name, _ in Net().named_parameters()}
    assert names == {*MATRICES, *VECTORS, *PREDICTOR_MATRICES, *PREDICTOR_VECTORS}


# The peak is 0.5 * 512 / 256 = 1; the warm-up has 8 steps, the cosine 32, so that 4 steps are an eighth of it.
TABLE = [(0, 0.0), (1, 0.125), (5, 0.625), (8, 1.0), *((8 + 4 * k, COSINE[k]) for k in range(7))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("step", "expected"), TABLE)
def test_every_group_follows_the_main_rate(kind: str, step: int, expected: float) -> None:
    main, rates = rates_at(Net(), config_of(kind), step)
    assert main == pytest.approx(expected, rel=1e-12)
    for name, (lr, decay) in rates.items():
        assert lr == main
        matrix = name in (*MATRICES, *PREDICTOR_MATRICES)
        assert decay == (0.04 if matrix or kind == "sgd" else 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("step", "expected"), TABLE)
def test_vectors_follow_bias_lr(kind: str, step: int, expected: float) -> None:
    main, rates = rates_at(Net(), config_of(kind, bias_lr=0.03), step)
    assert main == pytest.approx(expected, rel=1e-12)
    for name, (lr, _) in rates.items():
        peak = 1.0 if name in (*MATRICES, *PREDICTOR_MATRICES) else 0.06
        assert lr == pytest.approx(peak * expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias_lr", [None, 0.03])
@pytest.mark.parametrize("step", [0, 3, 8, 39])
def test_constant_predictor_lr_is_the_peak(kind: str, bias_lr: float | None, step: int) -> None:
    moving = rates_at(Net(), config_of(kind, bias_lr=bias_lr), step)[1]
    main, rates = rates_at(Net(), config_of(kind, bias_lr=bias_lr, constant_predictor_lr=True), step)
    assert main == moving["stem.weight"][0]
    for name, (lr, decay) in rates.items():
        assert lr == (1.0 if name.startswith("predictors.") else moving[name][0])
        assert decay == moving[name][1]


# An epoch has 4 steps: step 6 belongs to the epoch from 4 (half of the warm-up), 23 to that from 20 (3 eighths).
@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (3, 0.0), (4, 0.5), (6, 0.5), (7, 0.5), (8, 1.0), (20, COSINE[3]), (23, COSINE[3])]
)
def test_rates_are_constant_within_an_epoch(step: int, expected: float) -> None:
    main, rates = rates_at(Net(), config_of("sgd", lr_schedule="epoch"), step)
    assert main == pytest.approx(expected, rel=1e-12)
    assert {lr for lr, _ in rates.values()} == {main}


# From 0.04 to 0.4 over 40 steps: 0.4 - 0.36 * cosine; 5 steps are an eighth of it.
@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("step", 0, 0.04),
        ("step", 5, 0.05370168414796836),
        ("step", 10, 0.09272077938642147),
        ("step", 20, 0.22),
        ("step", 30, 0.34727922061357855),
        ("epoch", 20, 0.22),
        ("epoch", 23, 0.22),
        ("epoch", 3, 0.04),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_moves_to_its_end(kind: str, schedule: str, step: int, expected: float) -> None:
    rates = rates_at(Net(), config_of(kind, weight_decay_end=0.4, lr_schedule=schedule), step)[1]
    for name in (*MATRICES, *PREDICTOR_MATRICES):
        assert rates[name][1] == pytest.approx(expected, rel=1e-12)
    for name in (*VECTORS, *PREDICTOR_VECTORS):
        assert rates[name][1] == (pytest.approx(expected, rel=1e-12) if kind == "sgd" else 0.0)


def test_weight_decay_reaches_its_end_and_may_fall_or_be_constant() -> None:
    assert weight_decay(40, 40, 0.04, 0.4) == pytest.approx(0.4, rel=1e-14)
    assert weight_decay(20, 40, 0.4, 0.0) == pytest.approx(0.2, rel=1e-14)
    assert weight_decay(13, 40, 1.5e-6, 1.5e-6) == 1.5e-6


def test_predictors_have_their_own_groups_and_frozen_parameters_none() -> None:
    net = Net()
    net.stem.requires_grad_(False)
    groups = parameter_groups(net)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {
        (group.vector, group.stacked, group.predictor): {names[id(p)] for p in group.parameters} for group in groups
    }
    assert found == {
        (False, False, False): set(MATRICES) - {"stem.weight"},
        (True, False, False): set(VECTORS) - {"stem.bias"},
        (False, True, True): set(PREDICTOR_MATRICES),
        (True, True, True): set(PREDICTOR_VECTORS),
    }
    assert set(rates_at(net, config_of("lars"), 5)[1]) == set(names.values()) - {"stem.weight", "stem.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_separate_predictors_have_the_rates_of_a_bank(kind: str) -> None:
    config = config_of(kind, bias_lr=0.03, constant_predictor_lr=True)
    apart = nn.Module()
    apart.predictors = nn.ModuleDict(Net().predictors.to_mlps())
    rates = rates_at(apart, config, 5)[1]
    assert len(rates) == 10
    assert {lr for lr, _ in rates.values()} == {1.0}
    decayed = {name for name, (_, decay) in rates.items() if decay}
    assert len(decayed) == (10 if kind == "sgd" else 4)


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_a_safe_load(kind: str) -> None:
    config = config_of(kind, bias_lr=0.03, constant_predictor_lr=True, weight_decay_end=0.4)
    torch.manual_seed(0)
    net, other = Net(), Net()
    other.load_state_dict(net.state_dict())
    first = build_optimizer(net, config)

    def update(optimizer: torch.optim.Optimizer, module: nn.Module, step: int) -> None:
        apply_rates(optimizer, config, batch_size=512, step=step, steps=40, steps_per_epoch=4)
        for p in module.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()

    for step in (3, 4):
        update(first, net, step)
    stream = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "network": net.state_dict()}, stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    other.load_state_dict(state["network"])
    second = build_optimizer(other, config)
    second.load_state_dict(state["optimizer"])
    for module, optimizer in ((net, first), (other, second)):
        update(optimizer, module, 5)
    for ours, theirs in zip(first.param_groups, second.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
        assert type(theirs["lr"]) is type(theirs["weight_decay"]) is float
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
