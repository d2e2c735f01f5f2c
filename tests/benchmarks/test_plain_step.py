"""The plain step computes the same numbers as ours, so that its speed is that of the same work."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from benchmarks.implementations.plain_step import PlainStep
from mvssl.config.options import Execution
from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.training.step import TrainStep
from pipelines.runtime import InputError
from pipelines.views.presets import paper_views

CPU = torch.device("cpu")
STEPS = 4
BYOL = Recipe(
    name="tiny",
    views=paper_views(num_local=1, num_cutout=1, size=32, local_size=16, blur_kernel=5),
    backbone=Backbone(name="test_resnet"),
    projector=Head(hidden=(32,), out=16),
    predictor=Head(hidden=(32,), out=16),
    optimizer=Optimizer(kind="lars", base_lr=3.0, weight_decay=1e-3, warmup_epochs=0),
    epochs=2,
    batch_size=8,
    evaluation=Evaluation(every_epochs=0, resize=32, crop=32),
)
RECIPES = {
    "byol": BYOL,
    "simsiam": dataclasses.replace(
        BYOL,
        method="simsiam",
        optimizer=Optimizer(kind="sgd", base_lr=0.5, weight_decay=1e-2, warmup_epochs=0, constant_predictor_lr=True),
    ),
    "mocov3": dataclasses.replace(
        BYOL,
        method="mocov3",
        temperature=1.0,
        optimizer=Optimizer(kind="adamw", base_lr=1e-2, weight_decay=0.1, warmup_epochs=0, clip_grad_norm=0.5),
    ),
    "shared, per-view": dataclasses.replace(BYOL, predictors="shared"),
}
RECIPES["simsiam, per-view"] = RECIPES["simsiam"]


def batch(recipe: Recipe, step: int) -> list[Tensor]:
    torch.manual_seed(step)
    return [torch.randn(recipe.batch_size, 3, view.size, view.size) for view in recipe.views]


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_those_of_our_step(name: str) -> None:
    recipe = RECIPES[name]
    sizes: dict[str, Any] = {"device": CPU, "total_steps": STEPS, "steps_per_epoch": 2}
    mode: Literal["joint", "per-view"] = "per-view" if name.endswith("per-view") else "joint"
    ours = TrainStep(recipe, execution=Execution(step_mode=mode), **sizes)
    plain = PlainStep(recipe, step_mode=mode, **sizes)
    plain.take_weights(ours.online)
    losses = [
        (float(plain(views, n)), float(ours(views, n).loss))
        for n, views in enumerate(map(batch, [recipe] * STEPS, range(STEPS)))
    ]
    assert losses[0][0] != pytest.approx(losses[-1][0], abs=1e-3)  # the updates count
    for plainly, fused in losses:
        assert plainly == pytest.approx(fused, abs=2e-4)


def test_accumulation_is_refused() -> None:
    recipe = dataclasses.replace(BYOL, accumulate=2)
    with pytest.raises(InputError, match="accumulate"):
        PlainStep(recipe, device=CPU, total_steps=2, steps_per_epoch=1)
