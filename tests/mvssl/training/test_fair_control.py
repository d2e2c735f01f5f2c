"""The paper's control is fair: a run with one shared predictor differs from the multi-task run only in its predictor.

The parts of both runs (`open_experiment`) are compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import mvssl.recipes
from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.distributed import World
from mvssl.models.view_batching import task_pairs
from mvssl.training.experiment import Experiment, open_experiment
from mvssl.training.step import StepOutput, TrainStep
from pipelines import draw

METHODS: dict[str, dict[str, Any]] = {
    "byol": {},
    "simsiam": {"task_weights": {"global": 1 / 3, "local": 1 / 3, "cutout": 1 / 3}},
    "mocov3": {"temperature": 1.0},
}


@pytest.fixture(scope="module", params=METHODS)
def pair(request: pytest.FixtureRequest, images: Path, tiny_recipe: Recipe) -> Iterator[tuple[Experiment, Experiment]]:
    """A run with a predictor per task, and its control."""
    recipe = replace(tiny_recipe, method=request.param, **METHODS[request.param])
    with ExitStack() as stack:
        opened = [
            stack.enter_context(
                open_experiment(
                    replace(recipe, predictors=predictors),
                    RunOptions(data=images, device="cpu", decoder="pillow", threads=1),
                    Console(quiet=True),
                    World(),
                )
            )
            for predictors in ("per-view", "shared")
        ]
        yield opened[0], opened[1]


def test_same_batches_of_the_same_views(pair: tuple[Experiment, Experiment]) -> None:
    """Every pixel that the two runs train on, from their own loaders, in the order of the permutation."""
    one, control = pair
    for epoch in (0, 2):
        permutation = one.order.permutation(epoch)
        assert np.array_equal(permutation, control.order.permutation(epoch))
        batches = list(zip(one.loader.epoch(epoch), control.loader.epoch(epoch), strict=True))
        assert len(batches) == one.order.steps_per_epoch == control.order.steps_per_epoch
        for step, (ours, theirs) in enumerate(batches):
            assert torch.equal(ours.index, theirs.index)
            assert np.array_equal(ours.index.numpy(), control.order.batch(epoch, step))
            assert len(ours.views) == len(theirs.views) == len(one.recipe.views)
            assert all(torch.equal(a, b) for a, b in zip(ours.views, theirs.views, strict=True))


def test_same_augmentation_parameters(pair: tuple[Experiment, Experiment]) -> None:
    """Crops and colours of an image depend on the seed, not on the predictors."""
    index, sizes = torch.tensor([4, 0, 31]), torch.tensor([[40, 50], [33, 60], [48, 48]])
    ours, theirs, other = (
        draw(recipe.views, sizes, seed=recipe.seed, epoch=1, index=index)
        for recipe in (*(e.recipe for e in pair), replace(pair[0].recipe, seed=7))
    )
    for field in fields(ours):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name
    assert not torch.equal(ours.crop, other.crop)


def test_same_initial_encoders_and_targets(pair: tuple[Experiment, Experiment]) -> None:
    """Weights and statistics are bit-identical; one shared predictor instead of one per task."""
    one, control = (experiment.step for experiment in pair)
    shared = control.online.state_dict()
    encoder = {name: value for name, value in one.online.state_dict().items() if not name.startswith("predictors.")}
    assert encoder.keys() == {name for name in shared if not name.startswith("predictors.")}
    assert any(name.startswith("projector.") for name in encoder)
    for name, value in encoder.items():
        assert torch.equal(value, shared[name]), name
    assert (one.target is None) == (control.target is None) == (one.recipe.method == "simsiam")
    if one.target is not None and control.target is not None:
        theirs = control.target.state_dict()
        assert one.target.state_dict().keys() == theirs.keys()
        for name, value in one.target.state_dict().items():
            assert torch.equal(value, theirs[name]), name
            assert torch.equal(value, encoder[name]), name
    assert one.online.predictors.tasks == ("global", "local", "cutout")
    assert control.online.predictors.tasks == ("shared",)
    for several, single in zip(one.online.predictors.parameters(), control.online.predictors.parameters(), strict=True):
        assert several.shape == (3, *single.shape[1:])
        assert single.shape[0] == 1


def test_same_pairs_schedule_and_rates(pair: tuple[Experiment, Experiment]) -> None:
    """The same number of updates and loss terms; optimisers with equal groups and rates."""
    one, control = pair
    assert replace(control.recipe, predictors="per-view") == one.recipe
    assert control.total_steps == one.total_steps
    assert [(t.task, t.pairs) for t in task_pairs(one.recipe.views, {})] == [
        ("global", ((0, 1), (1, 0))),
        ("local", ((2, 0), (2, 1))),
        ("cutout", ((3, 0), (3, 1))),
    ]
    for ours, theirs in zip(one.step.optimizer.param_groups, control.step.optimizer.param_groups, strict=True):
        assert len(ours["params"]) == len(theirs["params"])
        assert {key: value for key, value in ours.items() if key != "params"} == {
            key: value for key, value in theirs.items() if key != "params"
        }


def double_step(recipe: Recipe) -> TrainStep:
    torch.set_default_dtype(torch.float64)
    try:
        return TrainStep(recipe, device="cpu", total_steps=12, steps_per_epoch=4)
    finally:
        torch.set_default_dtype(torch.float32)


def test_with_equal_predictors_the_first_step_is_the_same(pair: tuple[Experiment, Experiment]) -> None:
    """The strongest check: three copies of the control's predictor give its losses and its encoder gradients."""
    views = [view.double() for view in next(iter(pair[0].loader.epoch(1))).views]
    one, control = (double_step(experiment.recipe) for experiment in pair)
    state = control.online.state_dict()
    copies = {name: torch.cat([value] * 3) for name, value in state.items() if name.startswith("predictors.")}
    one.online.load_state_dict(state | copies)
    outputs: list[StepOutput] = []
    gradients: list[dict[str, Tensor]] = []
    for step in (one, control):
        step.optimizer.register_step_pre_hook(
            lambda *_, network=step.online: gradients.append({n: p.grad.clone() for n, p in network.named_parameters()})
        )
        outputs.append(step(views, 5))
    torch.testing.assert_close(outputs[0].losses, outputs[1].losses, rtol=1e-10, atol=1e-12)
    assert outputs[0].losses.shape == (3,)
    assert (outputs[0].lr, outputs[0].tau) == (outputs[1].lr, outputs[1].tau)
    ours, theirs = gradients
    for name, expected in theirs.items():
        # The shared predictor gets the sum of the per-task predictors' gradients.
        mine = ours[name].sum(dim=0, keepdim=True) if name.startswith("predictors.") else ours[name]
        assert (mine - expected).norm() <= 1e-9 * expected.norm() + 1e-13, name


@pytest.mark.parametrize("method", METHODS)
def test_published_controls_change_the_predictor_alone(method: str) -> None:
    """All other fields of the recipes are equal."""
    recipe = mvssl.recipes.get_recipe(f"{method}_resnet50_200ep")
    control = mvssl.recipes.get_recipe(f"{method}_resnet50_200ep_shared")
    assert (recipe.predictors, control.predictors) == ("per-view", "shared")
    assert replace(control, name=recipe.name, predictors="per-view") == recipe
