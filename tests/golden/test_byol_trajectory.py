"""The losses of the first 20 steps of a small multi-task BYOL run, kept in byol_trajectory.json.

A change of any number of the step shows here, wanted or not. After a wanted one, running this file as a script writes
the JSON anew; say in the commit why the numbers moved.

The backbone is a small transformer: residual networks with BatchNorm enlarge rounding about 3 times a step at first.
Tolerances: the file holds the run in float64, and `float32_error`: the largest difference from it of 8 runs in float32
whose initial weights were moved by one rounding (6e-8) each, measured when it was written: about 2e-6. A ReLU of a head
that falls on the other side of 0 can add jumps (up to 1e-4 were seen at larger learning rates), so 1e-3 is allowed in
float32; float64 rounds 5e8 times finer and is allowed 1e-8.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mvssl.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.step import TrainStep
from pipelines.views.presets import paper_views

FILE = Path(__file__).with_name("byol_trajectory.json")
STEPS = 20
RECIPE = Recipe(
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
    compile="off",
    precision="fp32",
    evaluation=Evaluation(resize=32, crop=32),
)


def trajectory(dtype: torch.dtype, *, nudge: int | None = None) -> list[list[float]]:
    """Losses [20][T] of a run on random coarse patterns; `nudge` seeds a change of the weights by one rounding."""
    step = TrainStep(RECIPE, device="cpu", total_steps=STEPS, steps_per_epoch=STEPS // RECIPE.epochs)
    step.online.to(dtype)
    step.target.to(dtype)
    if nudge is not None:
        noise = torch.Generator().manual_seed(nudge)
        for p in step.online.parameters():
            p.data *= 1 + 6e-8 * torch.randn(p.shape, generator=noise)
        step.target.copy_from(step.online)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for k in range(STEPS):
        base = torch.randn(RECIPE.batch_size, 3, 4, 4, generator=generator)
        views = []
        for spec in RECIPE.views:  # one pattern per image, each view with its own noise
            smooth = torch.nn.functional.interpolate(base, size=(spec.size, spec.size))
            views.append((smooth + 0.5 * torch.randn(smooth.shape, generator=generator)).to(dtype))
        losses.append(step(views, k).losses.tolist())
    return losses


def largest_error(ours: list[list[float]], expected: list[list[float]]) -> float:
    """Largest difference between two trajectories."""
    return (torch.tensor(ours, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trajectory_is_the_golden_one(dtype: torch.dtype) -> None:
    golden = json.loads(FILE.read_text())
    assert len(golden["losses"]) == STEPS
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    assert largest_error(trajectory(dtype), golden["losses"]) <= tolerance


def test_tolerance_is_small_beside_what_is_learned() -> None:
    golden = json.loads(FILE.read_text())
    losses = torch.tensor(golden["losses"])
    assert losses[-1].mean() < losses[0].mean() - 0.5
    assert golden["float32_error"] < 1e-5


if __name__ == "__main__":
    exact = trajectory(torch.float64)
    error = max(largest_error(trajectory(torch.float32, nudge=n), exact) for n in range(8))
    FILE.write_text(json.dumps({"float32_error": error, "losses": exact}, indent=1) + "\n")
    print(f"{FILE}: float32 differs from float64 by {error:.2e}; last losses {exact[-1]}")
