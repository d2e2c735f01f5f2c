"""A batch in parts gives the update of the whole batch where no layer looks at more than one image.

With BatchNorm it gives that of as many ranks: `test_ranks_step.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.distributed import World
from mvssl.training.step import StepOutput, TrainStep
from pipelines.runtime import InputError
from pipelines.views.presets import paper_views
from tests.samples.tiny_runs import make_step

BATCH = 6
HEAD = Head(hidden=(20,), out=12, norm="layer")
RECIPE = Recipe(
    name="accumulate",
    views=paper_views(size=32, local_size=16, blur_kernel=5),
    backbone=Backbone(name="test_vit"),
    projector=HEAD,
    predictor=HEAD,
    optimizer=Optimizer(kind="lars", base_lr=20.0, eta=0.01, warmup_epochs=1),
    epochs=5,
    batch_size=BATCH,
    target_decay=0.9,
    evaluation=Evaluation(resize=32, crop=32),
)
CHANGES: dict[str, dict[str, Any]] = {
    "byol": {},
    "simsiam": {
        "method": "simsiam",
        "projector": replace(HEAD, output_norm=True),
        "optimizer": Optimizer(kind="sgd", base_lr=4.0, warmup_epochs=1, clip_grad_norm=0.05),
    },
}


def make(**changes: Any) -> TrainStep:
    return make_step(RECIPE, total=9, **changes)


def run(accumulate: int, **changes: Any) -> tuple[TrainStep, list[StepOutput], list[dict[str, Tensor]]]:
    """Three updates in float64: the step, its outputs and the gradients of each."""
    torch.set_default_dtype(torch.float64)
    try:
        step = make(accumulate=accumulate, **changes)
    finally:
        torch.set_default_dtype(torch.float32)
    gradients: list[dict[str, Tensor]] = []
    step.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad.clone() for name, p in step.online.named_parameters()})
    )
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for k in (1, 2, 5):
        shapes = [(BATCH, 3, spec.size, spec.size) for spec in RECIPE.views]
        views = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        outputs.append(step(views, k))
    return step, outputs, gradients


def assert_close(ours: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Equal to a relative error (of norms) of 1e-12; timm interpolates the position embedding in float32: 1e-8."""
    assert ours.keys() == whole.keys()
    for name, expected in whole.items():
        error = (ours[name] - expected).norm().item()
        tolerance = 1e-8 if name == "backbone.pos_embed" else 1e-12
        assert error <= tolerance * expected.norm().item() + 1e-15, name


@pytest.mark.parametrize("accumulate", [2, 3])
@pytest.mark.parametrize("step_mode", ["joint", "per-view"])
@pytest.mark.parametrize("method", CHANGES)
def test_parts_give_the_update_of_the_whole(method: str, step_mode: str, accumulate: int) -> None:
    """One update for all parts, by the mean of their losses: same losses, gradients, clipping, weights, target."""
    whole, expected, whole_gradients = run(1, **CHANGES[method])
    step, outputs, gradients = run(accumulate, step_mode=step_mode, **CHANGES[method])
    assert len(gradients) == len(whole_gradients) == 3  # one update a batch
    for output, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.losses, other.losses, rtol=1e-10, atol=0)
        assert output.loss.item() == pytest.approx(other.loss.item(), rel=1e-10)
        assert output.grad_norm.item() == pytest.approx(other.grad_norm.item(), rel=1e-10)
        torch.testing.assert_close(output.embedding, other.embedding, rtol=1e-9, atol=1e-12)
        assert len(output.embedding) == BATCH
    for ours, theirs in zip(gradients, whole_gradients, strict=True):
        assert_close(ours, theirs)
    assert_close(step.online.state_dict(), whole.online.state_dict())
    assert (step.target is None) == (whole.target is None) == (method == "simsiam")
    if step.target is not None and whole.target is not None:
        assert_close(step.target.state_dict(), whole.target.state_dict())


def test_clipping_above_is_at_work() -> None:
    """Or the SimSiam case would not show that the norm is that of the whole batch's gradient."""
    _, outputs, _ = run(2, **CHANGES["simsiam"])
    assert all(output.grad_norm > 0.05 for output in outputs)


def test_what_cannot_be_split_is_refused() -> None:
    """The message names the field, its value, what is allowed and what to do."""
    with pytest.raises(InputError, match=r"Recipe.accumulate is 4 .*divisor of batch_size \(6\).*give"):
        make(accumulate=4)
    with pytest.raises(
        InputError,
        match=r"batch_size is 6 .*at least 12 on 1 ranks with 6 micro-batches.*fewer micro.*--accumulate 1 or 2 or 3\)",
    ):
        make(accumulate=6)
    with pytest.raises(
        InputError,
        match=r"Recipe.batch_size is 6 .*multiple of 2 ranks times 2 micro-batches.*give each rank.*\(--accumulate 1\)",
    ):
        TrainStep(
            replace(RECIPE, accumulate=2),
            device="cpu",
            total_steps=9,
            steps_per_epoch=2,
            world=World(rank=0, size=2, local_rank=0),
        )
