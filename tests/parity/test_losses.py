"""The pair losses alone, against the same quantities written differently."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mvssl.config.recipe import Recipe
from mvssl.methods import get_method
from mvssl.methods.method import PairLoss
from pipelines.views.presets import paper_views

BATCH, KEYS, DIM = 4, 9, 5


def loss_of(method: str, temperature: float | None = None) -> PairLoss:
    recipe = Recipe(name="losses", method=method, views=paper_views(), temperature=temperature)
    return get_method(method).make_loss(recipe)


def vectors(*shape: int, seed: int) -> Tensor:
    """Random rows of lengths from 0.1 to 100, so that a loss that forgot to divide by them shows."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 2, shape[0], dtype=torch.float64)[:, None]
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def info_nce(prediction: Tensor, keys: Tensor, temperature: float) -> float:
    """Number by number: -log of the own key's share of exp(cosine / T), the mean over images, times 2T."""
    total = 0.0
    for image, p in enumerate(prediction.tolist()):
        weights = []
        for key in keys.tolist():
            cosine = sum(a * b for a, b in zip(p, key, strict=True)) / (math.hypot(*p) * math.hypot(*key))
            weights.append(math.exp(cosine / temperature))
        total -= math.log(weights[image] / sum(weights))
    return 2 * temperature * total / len(prediction)


def test_byol_is_the_squared_distance_of_unit_vectors() -> None:
    p, t = vectors(BATCH, DIM, seed=1), vectors(BATCH, DIM, seed=2)
    distances = [
        sum((a / math.hypot(*x) - b / math.hypot(*y)) ** 2 for a, b in zip(x, y, strict=True))
        for x, y in zip(p.tolist(), t.tolist(), strict=True)
    ]
    assert loss_of("byol")(p, t).item() == pytest.approx(sum(distances) / BATCH, rel=1e-12)


def test_simsiam_is_minus_the_cosine_of_the_angle() -> None:
    """On planes, where the angles are known; and half of BYOL's loss less 1 anywhere."""
    angles = torch.tensor([0.0, 0.3, 1.9, math.pi], dtype=torch.float64)
    p = torch.stack([3 * angles.cos(), 3 * angles.sin()], dim=1)
    t = torch.tensor([[0.01, 0.0]], dtype=torch.float64).expand(4, 2)
    expected = -(1 + math.cos(0.3) + math.cos(1.9) - 1) / 4
    assert loss_of("simsiam")(p, t).item() == pytest.approx(expected, rel=1e-12)
    p, t = vectors(BATCH, DIM, seed=1), vectors(BATCH, DIM, seed=2)
    assert loss_of("simsiam")(p, t).item() == pytest.approx(loss_of("byol")(p, t).item() / 2 - 1, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("keys", [BATCH, KEYS])
def test_mocov3_is_info_nce(keys: int, temperature: float) -> None:
    """With the keys of the own images alone, and with those of other ranks behind them."""
    p, t = vectors(BATCH, DIM, seed=1), vectors(keys, DIM, seed=2)
    ours = loss_of("mocov3", temperature)(p, t).item()
    assert ours == pytest.approx(info_nce(p, t, temperature), rel=1e-12)


def test_mocov3_on_numbers_known_beforehand() -> None:
    """Equal keys share alike: 2T log N. Opposite keys: the own one at cosine 1 beside one at -1."""
    ones = torch.ones(BATCH, DIM, dtype=torch.float64)
    keys = torch.ones(KEYS, DIM, dtype=torch.float64)
    assert loss_of("mocov3", 0.2)(ones, keys).item() == pytest.approx(2 * 0.2 * math.log(KEYS), rel=1e-12)
    pair = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    assert loss_of("mocov3", 1.0)(pair, pair).item() == pytest.approx(2 * math.log1p(math.exp(-2)), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "temperature"), [("byol", None), ("simsiam", None), ("mocov3", 1.0), ("mocov3", 0.2)]
)
def test_gradient_by_finite_differences(method: str, temperature: float | None) -> None:
    """Central differences in float64: their error is of the order of step^2, 1e-10 beside gradients of 1e-2 to 1."""
    loss, step = loss_of(method, temperature), 1e-5
    generator = torch.Generator().manual_seed(3)
    p, t = (
        torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in (BATCH, KEYS if temperature else BATCH)
    )
    p.requires_grad_()
    loss(p, t).backward()
    flat = p.detach().flatten()
    for i in range(flat.numel()):
        up, down = flat.clone(), flat.clone()
        up[i] += step
        down[i] -= step
        slope = (loss(up.view_as(p), t) - loss(down.view_as(p), t)).item() / (2 * step)
        assert p.grad.flatten()[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(
    ("method", "temperature"), [("byol", None), ("simsiam", None), ("mocov3", 1.0), ("mocov3", 0.2)]
)
def test_float32_inside_under_autocast(method: str, temperature: float | None) -> None:
    """From bfloat16 numbers to float32 accuracy: products in bfloat16 would be off by 1e-3 and more."""
    loss = loss_of(method, temperature)
    p, t = vectors(BATCH, 64, seed=1).bfloat16(), vectors(KEYS if temperature else BATCH, 64, seed=2).bfloat16()
    p.requires_grad_()
    exact = loss(p.detach().double(), t.double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(p, t)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(exact, rel=1e-6, abs=1e-6)
    low.backward()
    wide = p.detach().double().requires_grad_()
    loss(wide, t.double()).backward()
    # The gradient itself is rounded to bfloat16, to a relative 2**-8.
    torch.testing.assert_close(p.grad.double(), wide.grad, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("method", "temperature"), [("byol", None), ("simsiam", None), ("mocov3", 0.2)])
def test_zero_vectors_give_no_nan(method: str, temperature: float | None) -> None:
    """A collapsed head gives a loss and a gradient that are numbers: the cosine with anything counts as 0."""
    p = torch.zeros(BATCH, DIM, dtype=torch.float64, requires_grad=True)
    loss = loss_of(method, temperature)(p, vectors(BATCH, DIM, seed=2))
    expected = {"byol": 2.0, "simsiam": 0.0, "mocov3": 2 * 0.2 * math.log(BATCH)}[method]
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    assert p.grad.isfinite().all()
