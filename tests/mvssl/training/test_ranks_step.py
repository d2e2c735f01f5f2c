"""The step on two and four gloo ranks equals one process with the whole batch, in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mvssl.config.options import Execution
from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.distributed import World, join_world
from mvssl.methods.mocov3 import pair_loss
from mvssl.training.step import TrainStep
from pipelines.views.presets import asymmetric, byol_views, paper_views
from tests.samples.ranks import results, run_ranks
from tests.samples.tiny_runs import split_changes

BATCH, STEPS = 16, 2


class Case(NamedTuple):
    """A step: its recipe, and how it is executed."""

    recipe: Recipe
    execution: Execution


def case(recipe: Recipe, **changes: Any) -> Case:
    return Case(*split_changes(recipe, changes))


LAYER = Recipe(  # without BatchNorm the mean of the ranks' gradients is the gradient of the whole batch
    name="ranks",
    views=paper_views(size=32, local_size=16, blur_kernel=5),
    backbone=Backbone(name="test_vit"),
    projector=Head(hidden=(24,), out=12, norm="layer"),
    predictor=Head(hidden=(20,), out=12, norm="layer"),
    optimizer=Optimizer(kind="sgd", base_lr=0.5, weight_decay=1e-3, warmup_epochs=0),
    epochs=3,
    batch_size=BATCH,
    target_decay=0.9,
    precision="fp32",
    evaluation=Evaluation(resize=32, crop=32),
)
BATCHNORM = replace(
    LAYER,
    backbone=Backbone(name="test_resnet"),
    projector=Head(hidden=(24,), out=12, output_norm=True),
    predictor=Head(hidden=(20,), out=12, output_norm=True),
)
ADAMW = "byol clipped"  # divides by the gradient norm, which amplifies rounding errors of small gradients
ON_FOUR = ("byol", "mocov3", "simsiam sequential", "batchnorm over ranks, mocov3")
SAME = {  # recipes with the same numbers on any number of ranks
    "byol": case(LAYER),
    "byol sequential": case(LAYER, step_mode="per-view"),
    "byol shared": case(LAYER, predictors="shared"),
    "byol asymmetric": case(LAYER, views=asymmetric(byol_views(size=32, blur_kernel=5))),
    ADAMW: case(
        LAYER, optimizer=Optimizer(kind="adamw", base_lr=0.1, warmup_epochs=0, clip_grad_norm=0.1, bias_lr=0.2)
    ),
    "byol two micro-batches": case(LAYER, accumulate=2, step_mode="per-view"),
    "byol frozen stem": case(LAYER, backbone=Backbone(name="test_vit", freeze_stem=True)),
    "simsiam": case(LAYER, method="simsiam"),
    "simsiam sequential": case(LAYER, method="simsiam", step_mode="per-view"),
    "mocov3": case(LAYER, method="mocov3", temperature=0.5),
    "mocov3 sequential": case(LAYER, method="mocov3", temperature=1.0, step_mode="per-view"),
    "mocov3 compiled": case(
        LAYER, method="mocov3", temperature=1.0, compile="on", views=asymmetric(byol_views(size=32, blur_kernel=5))
    ),
    "batchnorm over ranks": case(BATCHNORM, sync_batchnorm="both"),
    "batchnorm over ranks, mocov3": case(BATCHNORM, sync_batchnorm="both", method="mocov3", temperature=1.0),
    "batchnorm over ranks, simsiam": case(BATCHNORM, sync_batchnorm="both", method="simsiam", step_mode="per-view"),
}
PER_RANK = {  # recipes with BatchNorm per rank: N micro-batches on one process equal N ranks
    "byol": case(BATCHNORM),
    "byol sequential": case(BATCHNORM, step_mode="per-view"),
    "byol clipped": case(BATCHNORM, optimizer=replace(LAYER.optimizer, clip_grad_norm=0.1)),
    "simsiam": case(BATCHNORM, method="simsiam"),
    "mocov3": case(BATCHNORM, method="mocov3", temperature=0.5),
    "byol compiled": case(BATCHNORM, compile="on"),
    "mocov3 without batchnorm": SAME["mocov3"],
}
PER_RANK_ON_FOUR = ("byol", "mocov3")


def in_micro_batches(step_case: Case, number: int) -> Case:
    return step_case._replace(recipe=replace(step_case.recipe, accumulate=number))


def batches(recipe: Recipe) -> list[list[Tensor]]:
    """The views of the whole batch of each step."""
    generator = torch.Generator().manual_seed(7)
    return [
        [torch.randn(BATCH, 3, spec.size, spec.size, generator=generator, dtype=torch.float64) for spec in recipe.views]
        for _ in range(STEPS)
    ]


def trace(step_case: Case, world: World, *, parts: int = 1, part: int = 0) -> dict[str, Tensor]:
    """Losses and gradients of each step and the final networks, on part `part` of the batch's `parts`, in float64."""
    recipe, execution = step_case
    torch.set_default_dtype(torch.float64)
    compile_model, torch.compile = torch.compile, partial(torch.compile, backend="aot_eager")  # fast, has float64
    try:
        step = TrainStep(
            recipe, execution=execution, device="cpu", total_steps=3 * STEPS, steps_per_epoch=STEPS, world=world
        )
        found: dict[str, Tensor] = {}
        number = 0

        def keep(*_: Any) -> None:
            found.update(
                {
                    f"gradient {number} {name}": p.grad.clone()
                    for name, p in step.online.named_parameters()
                    if p.grad is not None
                }
            )

        step.optimizer.register_step_pre_hook(keep)
        for number, views in enumerate(batches(recipe)):
            output = step([view.chunk(parts)[part] for view in views], number)
            found[f"losses {number}"] = world.mean(output.losses)
            found[f"norm {number}"] = output.grad_norm
        found |= {f"online {name}": value.clone() for name, value in step.online.state_dict().items()}
        if step.target is not None:
            found |= {f"target {name}": value.clone() for name, value in step.target.state_dict().items()}
        return found
    finally:
        torch.set_default_dtype(torch.float32)
        torch.compile = compile_model


def traces(cases: dict[str, Case]) -> dict[str, dict[str, Tensor]]:
    """`trace` of each case on this rank's part of the batch; called on a rank."""
    with join_world(cuda=False) as world:
        return {name: trace(each, world, parts=world.size, part=world.rank) for name, each in cases.items()}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-9) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(value.double().norm().item(), 1e-6)
        error = (ours[name].double() - value.double()).norm().item() / scale
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.fixture(scope="module")
def two() -> list[dict[str, dict[str, Tensor]]]:
    return results(run_ranks(traces, 2, SAME | {f"per rank: {name}": recipe for name, recipe in PER_RANK.items()}))


@pytest.fixture(scope="module")
def four() -> list[dict[str, dict[str, Tensor]]]:
    per_rank = {f"per rank: {name}": PER_RANK[name] for name in PER_RANK_ON_FOUR}
    return results(run_ranks(traces, 4, {name: SAME[name] for name in ON_FOUR} | per_rank))


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_are_one_process(two: list[dict[str, dict[str, Tensor]]], name: str) -> None:
    expected = trace(SAME[name]._replace(execution=replace(SAME[name].execution, compile="off")), World())
    for rank in two:
        assert_same(rank[name], expected, tolerance=1e-7 if name == ADAMW else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_are_one_process(four: list[dict[str, dict[str, Tensor]]], name: str) -> None:
    expected = trace(SAME[name], World())
    for rank in four:
        assert_same(rank[name], expected)


@pytest.mark.parametrize("name", PER_RANK)
def test_two_micro_batches_are_two_ranks(two: list[dict[str, dict[str, Tensor]]], name: str) -> None:
    """Losses, gradients, updates, and the buffers: those of the first micro-batch are those of rank 0."""
    assert_same(trace(in_micro_batches(PER_RANK[name], 2), World()), two[0][f"per rank: {name}"])


@pytest.mark.parametrize("name", PER_RANK_ON_FOUR)
def test_four_micro_batches_are_four_ranks(four: list[dict[str, dict[str, Tensor]]], name: str) -> None:
    assert_same(trace(in_micro_batches(PER_RANK[name], 4), World()), four[0][f"per rank: {name}"])


def test_micro_batches_with_batchnorm_differ_from_the_whole_batch() -> None:
    """Or the agreement above would show nothing."""
    ours, whole = trace(case(BATCHNORM, accumulate=2), World()), trace(case(BATCHNORM), World())
    assert not torch.allclose(ours["losses 0"], whole["losses 0"], rtol=1e-3)


def test_without_synchronisation_batchnorm_sees_its_own_rank(two: list[dict[str, dict[str, Tensor]]]) -> None:
    """The first gradient is the mean of the gradients of each part of the batch alone; buffers stay per rank."""
    half = case(BATCHNORM, batch_size=BATCH // 2)
    alone = [trace(half, World(), parts=2, part=part) for part in range(2)]
    ranks = [rank["per rank: byol"] for rank in two]
    for name in [name for name in alone[0] if name.startswith("gradient 0")]:
        expected = (alone[0][name] + alone[1][name]) / 2
        for rank in ranks:
            torch.testing.assert_close(rank[name], expected, rtol=1e-9, atol=1e-12)
    mean = "online backbone.bn1.running_mean"
    assert not torch.equal(ranks[0][mean], ranks[1][mean])
    weight = "online backbone.conv1.0.weight"
    assert torch.equal(ranks[0][weight], ranks[1][weight])


def gathered_loss(predictions: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """MoCo v3's loss of this rank's rows with the keys of all ranks, and the gathered keys; called on a rank."""
    with join_world(cuda=False) as world:
        own = keys.chunk(world.size)[world.rank]
        everyone = world.gather_own_first(own)
        loss = pair_loss(predictions.chunk(world.size)[world.rank], everyone, temperature=0.3)
        return loss, everyone


@pytest.mark.slow
def test_infonce_with_gathered_keys_is_the_formula_of_the_whole_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    predictions, keys = (torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    outcomes = results(run_ranks(gathered_loss, 2, predictions, keys))
    rows = []
    for i in range(8):  # -log softmax of the image's own key, times 2 T
        cosine = [float(predictions[i] @ k / (predictions[i].norm() * k.norm())) / 0.3 for k in keys]
        rows.append(0.6 * (float(torch.tensor(cosine, dtype=torch.float64).exp().sum().log()) - cosine[i]))
    assert float(outcomes[0][0]) == pytest.approx(sum(rows[:4]) / 4, rel=1e-12)
    assert float(outcomes[1][0]) == pytest.approx(sum(rows[4:]) / 4, rel=1e-12)
    assert torch.equal(outcomes[0][1], keys)
    assert torch.equal(outcomes[1][1], torch.cat([keys[4:], keys[:4]]))
