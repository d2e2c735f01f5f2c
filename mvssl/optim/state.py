"""Checks an optimiser's state from a checkpoint, of which torch takes whatever it is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def check_optimizer_state(optimizer: Optimizer, state: Any) -> None:
    """Check that a state_dict is one of this optimiser: groups, and tensors of the parameters' shapes.

    Raises:
        ValueError: it is not; says what differs.
    """
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    held = state.get("state") if isinstance(state, Mapping) else None
    if not isinstance(groups, list) or len(groups) != len(optimizer.param_groups) or not isinstance(held, Mapping):
        raise ValueError("the optimiser's state has other groups of parameters")
    known = set()
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        numbers = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(numbers, list) or len(numbers) != len(own["params"]):
            raise ValueError("the optimiser's state has other parameters")
        for name, value in group.items():
            if name != "params" and not _alike(value, own.get(name, value)):
                raise ValueError(f"the optimiser's {name} is of another kind")
        for number, parameter in zip(numbers, own["params"], strict=True):
            if type(number) is not int or number in known:
                raise ValueError("the optimiser's parameters have no numbers, or the same twice")
            known.add(number)
            _check_tensors(held.get(number, {}), parameter)
    if not set(held) <= known:
        raise ValueError("the optimiser's state has a parameter that is in no group")


def check_scaler_state(state: Any) -> None:
    """Check the state_dict of a gradient scaler; ValueError if it is none."""
    numbers = list(state.values()) if isinstance(state, Mapping) else [None]
    if not all(isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 for value in numbers):
        raise ValueError("the gradient scaler's state is no table of numbers")
    if not state.get("scale", 1) > 0:
        raise ValueError("the gradient scaler's scale is 0")


def _check_tensors(held: Any, parameter: Tensor) -> None:
    if not isinstance(held, Mapping):
        raise ValueError("the optimiser's state of a parameter is no table")
    for name, value in held.items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
            raise ValueError(
                f"the optimiser's {name} has the shape {list(value.shape)} instead of {list(parameter.shape)}"
            )
        if not isinstance(value, (Tensor, int, float, type(None))):
            raise ValueError(f"the optimiser's {name} is of another kind")


def _alike(value: Any, own: Any) -> bool:
    """Whether a setting of a group can replace ours: a finite number a number, else of the same type, or none."""
    if isinstance(value, Tensor) or isinstance(own, Tensor):
        return isinstance(value, (Tensor, float, int)) and isinstance(own, (Tensor, float, int))
    if isinstance(value, (list, tuple)) and isinstance(own, (list, tuple)):
        return len(value) == len(own) and all(map(_alike, value, own))
    if type(value) in (int, float) and type(own) in (int, float):
        return math.isfinite(value)
    return value is None or own is None or type(value) is type(own)
