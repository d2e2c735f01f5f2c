"""Gradients of single views: their sum is the step's gradient, their cosines follow the formula."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvssl.config.recipe import Head, Recipe
from mvssl.monitor.view_diagnostics import gradient_cosines, view_diagnostics
from mvssl.training.step import TrainStep
from pipelines.views.presets import byol_views, paper_views

HEADS: dict[str, Any] = {"projector": Head(hidden=(16,), out=8), "predictor": Head(hidden=(16,), out=8)}


def batch(recipe: Recipe, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(recipe.batch_size, 3, view.size, view.size, generator=generator) for view in recipe.views]


def step_gradients(step: TrainStep, views: list[Tensor]) -> dict[str, Tensor]:
    """The gradients that a step updates by, from momentum buffers: plain SGD's first buffer is the gradient."""
    step(views, 0)
    buffers = step.optimizer.state
    return {name: buffers[p]["momentum_buffer"] for name, p in step.online.named_parameters() if p in buffers}


@pytest.mark.parametrize("method", ["byol", "simsiam", "mocov3"])
@pytest.mark.parametrize("predictors", ["shared", "per-view"])
def test_their_weighted_sum_is_the_gradient_of_the_step(tiny_recipe: Recipe, method: str, predictors: Any) -> None:
    recipe = replace(
        tiny_recipe,
        method=method,
        predictors=predictors,
        temperature=0.5 if method == "mocov3" else None,
        views=paper_views(num_local=2, num_cutout=1, size=32, local_size=16, blur_kernel=5),
        task_weights={"global": 0.5, "local": 2.0, "cutout": 1.0},
        optimizer=replace(tiny_recipe.optimizer, kind="sgd", weight_decay=0.0),
        **HEADS,
    )
    step = TrainStep(recipe, device="cpu", total_steps=4, steps_per_epoch=4)
    views = batch(recipe, seed=1)
    online, target = copy.deepcopy(step.online), copy.deepcopy(step.target)
    found = view_diagnostics(recipe, online, target, [views])

    wanted = step_gradients(step, views)
    weight = {"global": 0.5 / 2, "local": 2.0 / 2, "cutout": 1.0}  # of a task, divided among its views
    for part, gradients in (("encoder", found.encoder), ("predictor", found.predictor)):
        names = [name for name in wanted if name.startswith("predictors.") == (part == "predictor")]
        expected = torch.cat([wanted[name].flatten() for name in names])
        summed = sum(weight[view.task or ""] * gradients[v] for v, view in enumerate(recipe.views))
        assert isinstance(summed, Tensor)
        torch.testing.assert_close(summed, expected, rtol=2e-4, atol=2e-6)


def test_batches_are_averaged(tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, views=byol_views(size=32, blur_kernel=5), task_weights={}, **HEADS)
    step = TrainStep(recipe, device="cpu", total_steps=4, steps_per_epoch=4)

    def of(*seeds: int) -> dict[int, Tensor]:
        batches = [batch(recipe, seed) for seed in seeds]
        return view_diagnostics(recipe, copy.deepcopy(step.online), copy.deepcopy(step.target), batches).encoder

    both, one, two = of(1, 2), of(1), of(2)
    for view, gradient in both.items():
        torch.testing.assert_close(gradient, (one[view] + two[view]) / 2, rtol=1e-4, atol=1e-7)


def test_cosines_within_and_across_tasks() -> None:
    views = paper_views(num_local=2, num_cutout=0, size=32, local_size=16, blur_kernel=5)
    gradients = {0: [1.0, 0.0], 1: [1.0, 1.0], 2: [-3.0, 0.0], 3: [0.0, 2.0]}
    found = gradient_cosines({v: torch.tensor(values) for v, values in gradients.items()}, views)
    half = 0.5**0.5
    assert found == pytest.approx({"global": half, "local": 0.0, "global/local": (-1 + 0 - half + half) / 4})


def test_predictors_per_task_share_nothing() -> None:
    views = paper_views(num_local=1, num_cutout=0, size=32, local_size=16, blur_kernel=5)
    gradients = {0: torch.tensor([1.0, 2.0, 0.0]), 1: torch.tensor([2.0, 1.0, 0.0]), 2: torch.tensor([0.0, 0.0, 1.0])}
    assert gradient_cosines(gradients, views, tasks_share=False) == {"global": pytest.approx(4 / 5)}


def test_collapsed_predictions_have_rank_one(tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, views=byol_views(size=32, blur_kernel=5), task_weights={}, **HEADS)
    step = TrainStep(recipe, device="cpu", total_steps=4, steps_per_epoch=4)
    healthy = view_diagnostics(recipe, copy.deepcopy(step.online), step.target, [batch(recipe, 1)])
    last = [module for module in step.online.projector.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(1.0)
    collapsed = view_diagnostics(recipe, step.online, step.target, [batch(recipe, 1)])
    assert collapsed.embedding_rank == pytest.approx(1.0, abs=1e-3)
    assert collapsed.embedding_std == pytest.approx(0.0, abs=1e-3)
    assert healthy.embedding_rank > 2
    assert healthy.prediction_rank.keys() == {"global"}
