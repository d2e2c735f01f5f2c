"""Methods are found by name; the BYOL loss has the expected values."""

from __future__ import annotations

import pytest
import torch

import mvssl
from mvssl.methods import get_method, methods
from pipelines.runtime import InputError


def test_methods_are_found_by_name() -> None:
    assert get_method("byol").name == "byol"
    assert set(methods()) == {"byol", "mocov3", "simsiam"}
    with pytest.raises(InputError, match=r"Recipe.method is 'boyl' .* did you mean byol\?"):
        get_method("boyl")


def test_byol_loss_on_known_angles() -> None:
    prediction = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    target = torch.tensor([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    expected = (0.0 + 4.0 + 2 - 2**0.5) / 3  # parallel, opposite, 45 degrees
    loss = get_method("byol").make_loss(mvssl.recipes.demo())
    assert loss(prediction, target).item() == pytest.approx(expected, rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(prediction.bfloat16(), target.bfloat16())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(expected, rel=1e-6)  # these numbers are exact in bfloat16
    assert loss(torch.zeros(1, 2), target[:1]).item() == 2.0  # a zero vector gives no NaN
