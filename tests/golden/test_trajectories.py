"""The losses of the first 20 steps of a small multi-task run of each method, kept in METHOD.json beside this file.

A change of any number of the step shows here, wanted or not. After a wanted one, running this file as a script writes
the JSON anew (of the methods it is given, or of all); say in the commit why the numbers moved.

The backbone is a small transformer: residual networks with BatchNorm enlarge rounding about 3 times a step at first.
Tolerances: a file holds the run in float64, and `float32_error`: the largest difference from it of 8 runs in float32
whose initial weights were moved by one rounding (6e-8) each, measured when it was written: 1e-6 to 2e-5. A ReLU of a
head that falls on the other side of 0 can add jumps (up to 1e-4 were seen at larger learning rates), so 1e-3 is allowed
in float32; float64 rounds 5e8 times finer and is allowed 1e-8.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.training.step import TrainStep
from pipelines.views.presets import paper_views

STEPS = 20
BYOL = Recipe(
    name="golden",
    views=paper_views(size=32, local_size=16, blur_kernel=5),
    backbone=Backbone(name="test_vit"),
    projector=Head(hidden=(32,), out=16),
    predictor=Head(hidden=(32,), out=16),
    optimizer=Optimizer(kind="lars", base_lr=1.0, warmup_epochs=1),
    epochs=4,
    batch_size=16,
    target_decay=0.9,
    seed=1,
    precision="fp32",
    evaluation=Evaluation(resize=32, crop=32),
)
# Heads, losses and optimisers as published (PAPER.md sections 3 to 5), with rates that learn within 20 steps.
RECIPES = {
    "byol": BYOL,
    "simsiam": replace(
        BYOL,
        method="simsiam",
        task_weights={"global": 1 / 3, "local": 1 / 3, "cutout": 1 / 3},
        projector=Head(hidden=(32, 32), out=16, output_norm=True),
        predictor=Head(hidden=(8,), out=16),
        optimizer=Optimizer(
            kind="sgd",
            base_lr=0.1,
            weight_decay=1e-4,
            warmup_epochs=0,
            constant_predictor_lr=True,
            lr_schedule="epoch",
        ),
        batch_size=64,  # three BatchNorms in a row over 16 images enlarge rounding to 1e-2 here
    ),
    "mocov3": replace(
        BYOL,
        method="mocov3",
        temperature=1.0,
        projector=Head(hidden=(32,), out=16, output_norm=True),
        predictor=Head(hidden=(32,), out=16, output_norm=True),
    ),
}
# By how much the tasks' mean loss falls, at least: half of what it did when the files were written.
LEARNED = {"byol": 0.5, "simsiam": 0.13, "mocov3": 0.07}


def file_of(method: str) -> Path:
    return Path(__file__).with_name(f"{method}.json")


def trajectory(recipe: Recipe, dtype: torch.dtype, *, nudge: int | None = None) -> list[list[float]]:
    """Losses [20][T] of a run on random coarse patterns; `nudge` seeds a change of the weights by one rounding."""
    step = TrainStep(recipe, device="cpu", total_steps=STEPS, steps_per_epoch=STEPS // recipe.epochs)
    step.online.to(dtype)
    if step.target is not None:
        step.target.to(dtype)
    if nudge is not None:
        noise = torch.Generator().manual_seed(nudge)
        for p in step.online.parameters():
            p.data *= 1 + 6e-8 * torch.randn(p.shape, generator=noise)
        if step.target is not None:
            step.target.copy_from(step.online)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for k in range(STEPS):
        base = torch.randn(recipe.batch_size, 3, 4, 4, generator=generator)
        views = []
        for spec in recipe.views:  # one pattern per image, each view with its own noise
            smooth = torch.nn.functional.interpolate(base, size=(spec.size, spec.size))
            views.append((smooth + 0.5 * torch.randn(smooth.shape, generator=generator)).to(dtype))
        losses.append(step(views, k).losses.tolist())
    return losses


def largest_error(ours: list[list[float]], expected: list[list[float]]) -> float:
    """Largest difference between two trajectories."""
    return (torch.tensor(ours, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", RECIPES)
def test_trajectory_is_the_golden_one(method: str, dtype: torch.dtype) -> None:
    """No number of the step has moved since the file was written."""
    golden: dict[str, Any] = json.loads(file_of(method).read_text())
    assert len(golden["losses"]) == STEPS
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    assert largest_error(trajectory(RECIPES[method], dtype), golden["losses"]) <= tolerance


@pytest.mark.parametrize("method", RECIPES)
def test_tolerance_is_small_beside_what_is_learned(method: str) -> None:
    """A run that learns nothing, or one that rounding drives, would make a poor witness."""
    golden: dict[str, Any] = json.loads(file_of(method).read_text())
    losses = torch.tensor(golden["losses"])
    assert losses[-1].mean() < losses[0].mean() - LEARNED[method]
    assert golden["float32_error"] < 1e-4


def write(method: str) -> None:
    """Run a method and keep its losses."""
    recipe = RECIPES[method]
    exact = trajectory(recipe, torch.float64)
    error = max(largest_error(trajectory(recipe, torch.float32, nudge=n), exact) for n in range(8))
    file_of(method).write_text(json.dumps({"float32_error": error, "losses": exact}, indent=1) + "\n")
    print(f"{file_of(method).name}: float32 differs from float64 by {error:.2e}; losses {exact[0]} to {exact[-1]}")


if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        write(name)
