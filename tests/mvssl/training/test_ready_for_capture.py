"""Every kind of step is the same operations on the same memory each time, as a CUDA graph needs; seen without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from mvssl.config.recipe import Optimizer
from mvssl.training.step import TrainStep
from pipelines.views.presets import paper_views
from tests.samples.capture_steps import ADAMW, MOCO, RECIPE, SIMSIAM, VIT, batches
from tests.samples.recorded_operations import NotReady, assert_ready
from tests.samples.tiny_runs import make_step

CASES: dict[str, dict[str, Any]] = {
    "lars": {},
    "lars, decay that changes": {"optimizer": replace(RECIPE.optimizer, weight_decay_end=0.1)},
    "clipped": {"optimizer": replace(RECIPE.optimizer, clip_grad_norm=0.1)},
    "sgd": {"optimizer": Optimizer(kind="sgd", base_lr=0.5, warmup_epochs=3)},
    "sgd, decay that changes": {
        "optimizer": Optimizer(kind="sgd", base_lr=0.5, weight_decay=1e-4, weight_decay_end=0.1, warmup_epochs=3)
    },
    "bias rate": {"optimizer": replace(RECIPE.optimizer, bias_lr=1.0, constant_predictor_lr=True)},
    "adamw, stochastic depth": VIT | ADAMW,
    "adamw without a schedule of decay": VIT | {"optimizer": Optimizer(kind="adamw", base_lr=0.1, warmup_epochs=3)},
    "simsiam": SIMSIAM,
    "simsiam, stochastic depth": SIMSIAM | VIT,
    "moco": MOCO,
    "moco, adamw, clipped": MOCO | VIT | {"optimizer": replace(ADAMW["optimizer"], clip_grad_norm=1.0)},
    "one predictor": {"predictors": "shared"},
    "bf16": {"precision": "bf16", "views": paper_views(size=64, local_size=32, blur_kernel=5)},
    "in parts": {"accumulate": 2},
    "moco in parts": MOCO | {"accumulate": 2},
    "view by view": {"step_mode": "per-view"},
    "simsiam view by view": SIMSIAM | {"step_mode": "per-view"},
    "moco view by view in parts": MOCO | {"step_mode": "per-view", "accumulate": 2},
}


def make(**changes: Any) -> TrainStep:
    return make_step(RECIPE, total=40, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_two_steps_are_the_same_operations(changes: dict[str, Any]) -> None:
    step = make(**changes)
    operations = assert_ready(step, batches(step))
    assert len(operations) > 100  # the recorder saw the step, its backward and its update
    assert any("_backward" in operation for operation in operations)


def test_views_of_one_size_without_grouping_are_ready_too() -> None:
    step = TrainStep(RECIPE, device="cpu", total_steps=40, steps_per_epoch=2, group_views=False)
    alone = assert_ready(step, batches(step))
    grouped = make()
    together = assert_ready(grouped, batches(grouped))
    forwards = [sum("convolution.default" in operation for operation in each) for each in (alone, together)]
    assert forwards[0] * 3 == forwards[1] * 7  # 5 views and 2 targets; 2 sizes and 1 size of targets


@pytest.mark.parametrize("kind", ["lars", "sgd", "adamw"])
def test_scaled_gradients_are_read_by_nobody(kind: Any) -> None:
    step = make(optimizer=Optimizer(kind=kind, base_lr=0.1, warmup_epochs=3, clip_grad_norm=1.0))
    # fp16 is refused on the CPU, but its scaler works there.
    step.scaler = GradScaler("cpu", init_scale=4.0, growth_interval=3)
    operations = assert_ready(step, batches(step))
    assert any("_amp_update_scale_" in operation for operation in operations)


class Changed(nn.Module):
    """A layer that does something else at every step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.calls = 0
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        match self.kind:
            case "a number of the host":
                return x * (1 + 0.1 * self.calls)
            case "a tensor of the host":
                return x * torch.tensor(1 + 0.1 * self.calls)
            case "a value read":
                return x * float(x.detach().abs().max())
            case "a branch by a value":
                return x if x.detach().sum() > 0 else 2 * x
            case "a shape by values":
                return x + x.detach()[x.detach() > 0].mean()
            case "another operation":
                return x if self.calls % 4 == 0 else x + x
            case "another buffer":
                self.scale = self.scale.clone()
                return x * self.scale
            case _:
                return x


BROKEN = {
    "a number of the host": "differs from step to step",
    "a tensor of the host": "makes a tensor of a number of the host",
    "a value read": "_local_scalar_dense reads a value",
    "a branch by a value": "reads a value",
    "a shape by values": "reads a value|shape",
    "another operation": "differs from step to step|operations, the next",
    "another buffer": r"'online.backbone.layer4.0.changed.scale'.*lie elsewhere",
}


def broken(kind: str) -> TrainStep:
    step = make()
    block: Any = step.online.get_submodule("backbone.layer4.0")
    block.changed = Changed(kind)
    block.register_forward_hook(lambda module, _, output: module.changed(output))
    return step


@pytest.mark.parametrize("kind", BROKEN)
def test_what_a_graph_would_not_repeat_is_found(kind: str) -> None:
    step = broken(kind)
    with pytest.raises(NotReady, match=BROKEN[kind]):
        assert_ready(step, batches(step))


def test_the_same_layer_without_a_change_passes() -> None:
    step = broken("nothing")
    assert_ready(step, batches(step))


def test_a_python_learning_rate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make()
    set_numbers = step._set_rates

    def with_floats(number: int) -> tuple[float, float]:
        result = set_numbers(number)
        for group in step.optimizer.param_groups:
            group["lr"] = float(group["lr"])
        return result

    monkeypatch.setattr(step, "_set_rates", with_floats)
    with pytest.raises(NotReady, match=r"group\.0\.lr.* lie elsewhere|differs from step to step"):
        assert_ready(step, batches(step))


def test_a_gradient_that_stays_is_found() -> None:
    step = make()
    step.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    with pytest.raises(NotReady, match="have a gradient"):
        assert_ready(step, batches(step))
