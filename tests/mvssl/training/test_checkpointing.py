"""Blocks that are computed again in the backward give the numbers of those whose activations are kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models import register_model
from torch import Tensor, nn

from mvssl.config.options import Execution
from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.models.backbones import build_backbone
from mvssl.models.checkpointing import Checkpointed, find_blocks
from mvssl.training.cuda_graph import wants_capture
from mvssl.training.memory import remedies
from mvssl.training.step import StepOutput, TrainStep
from pipelines.runtime import InputError
from pipelines.views.presets import paper_views
from tests.samples.ranks import results, run_ranks
from tests.samples.tiny_runs import make_step

BATCH = 4
RECIPE = Recipe(
    name="checkpointing",
    views=paper_views(size=32, local_size=16, blur_kernel=5),
    backbone=Backbone(name="test_resnet"),
    projector=Head(hidden=(20,), out=12),
    predictor=Head(hidden=(20,), out=12),
    optimizer=Optimizer(kind="sgd", base_lr=2.0, warmup_epochs=1),
    epochs=5,
    batch_size=BATCH,
    target_decay=0.9,
    evaluation=Evaluation(resize=32, crop=32),
)
VIT = {"backbone": Backbone(name="test_vit", drop_path=0.4)}
CASES: dict[str, dict[str, Any]] = {
    "resnet": {},
    "resnet, one view after another": {"step_mode": "per-view"},
    "resnet, micro-batches": {"accumulate": 2},
    "resnet, micro-batches and one view after another": {"accumulate": 2, "step_mode": "per-view"},
    "resnet without target network": {"method": "simsiam"},
    "resnet with stochastic depth": {"backbone": Backbone(name="test_resnet", drop_path=0.4)},
    "another activation, squeeze and excitation": {"backbone": Backbone(name="test_efficientnet")},
    "vit with stochastic depth": VIT,
    "vit, micro-batches and one view after another": {**VIT, "accumulate": 2, "step_mode": "per-view"},
}


def updates(**changes: Any) -> tuple[TrainStep, list[StepOutput], list[dict[str, Tensor]]]:
    """Three updates in float64: the step, its outputs and the gradients of each."""
    torch.set_default_dtype(torch.float64)
    try:
        step = make_step(RECIPE, total=9, **changes)
    finally:
        torch.set_default_dtype(torch.float32)
    gradients: list[dict[str, Tensor]] = []
    step.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad.clone() for name, p in step.online.named_parameters()})
    )
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for k in range(3):
        shapes = [(BATCH, 3, spec.size, spec.size) for spec in step.recipe.views]
        views = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        outputs.append(step(views, k))
    return step, outputs, gradients


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_same_losses_gradients_and_statistics_bit_by_bit(case: str) -> None:
    step, outputs, gradients = updates(**CASES[case])
    again, outputs_again, gradients_again = updates(**CASES[case], checkpointing=True)
    assert any(isinstance(module, Checkpointed) for module in again.online.backbone.modules())
    for ours, theirs in zip(outputs_again, outputs, strict=True):
        assert torch.equal(ours.losses, theirs.losses)
        assert torch.equal(ours.embedding, theirs.embedding)
    for gradient, expected in zip(gradients_again, gradients, strict=True):
        assert_same(gradient, expected)
    assert_same(again.online.state_dict(), step.online.state_dict())  # running statistics, and their number of batches
    if step.target is not None and again.target is not None:
        assert_same(again.target.state_dict(), step.target.state_dict())
    assert "activations recomputed block by block" in again.description


def test_blocks_run_twice_and_the_rest_once() -> None:
    counts: dict[str, int] = {}
    for checkpointing in (False, True):
        step = make_step(RECIPE, total=9, checkpointing=checkpointing, step_mode="per-view")

        def count(name: str) -> Any:
            def hook(*_: Any) -> None:
                counts[name] = counts.get(name, 0) + 1

            return hook

        for name, module in step.online.backbone.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count(f"{checkpointing} {name}"))
        step([torch.randn(BATCH, 3, view.size, view.size) for view in RECIPE.views], 0)
    views = len(RECIPE.views)
    assert counts["False conv1.0" if "False conv1.0" in counts else "False conv1"] == views
    for name in [key.removeprefix("False ") for key in counts if key.startswith("False ")]:
        assert counts[f"True {name}"] == views * (2 if name.startswith("layer") else 1), name


class _Block(nn.Sequential):
    """Convolution, BatchNorm, ReLU, dropout."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        norm, drop = nn.BatchNorm2d(outputs), nn.Dropout(dropout)
        super().__init__(nn.Conv2d(inputs, outputs, 3, bias=False), norm, nn.ReLU(), drop)


class _Net(nn.Module):
    """As little as shows everything, since compiling takes its time."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, bias=False)
        self.blocks = nn.Sequential(_Block(8, 12, 0.0), _Block(12, 16, dropout))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.stem(x)).mean(dim=(2, 3))
        return features


@register_model
def mvssl_test_blocks(
    pretrained: bool = False, num_classes: int = 0, dropout: float = 0.0, **options: Any
) -> nn.Module:
    if "dynamic_img_size" in options:
        raise TypeError(f"unexpected {options}")
    return _Net(dropout)


@register_model
def mvssl_test_blocks_drop(pretrained: bool = False, num_classes: int = 0, **options: Any) -> nn.Module:
    network: nn.Module = mvssl_test_blocks(pretrained, num_classes, dropout=0.3, **options)
    return network


SMALL = {
    "backbone": Backbone(name="mvssl_test_blocks"),
    "views": paper_views(num_local=1, num_cutout=0, size=32, local_size=24, blur_kernel=5),
}


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_like_eager(**changes: Any) -> None:
    step, outputs, gradients = updates(**changes)
    again, outputs_again, gradients_again = updates(**changes, checkpointing=True, compile="on")
    assert again.compiled
    for ours, theirs in zip(outputs_again, outputs, strict=True):
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-10, atol=0)
    for gradient, expected in zip(gradients_again, gradients, strict=True):
        assert_same(gradient, expected, tolerance=1e-10)
    assert_same(again.online.state_dict(), step.online.state_dict(), tolerance=1e-10)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("step_mode", ["joint", "per-view"])
def test_traced_for_the_compiler_it_gives_what_eager_mode_does(step_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda work, **options: real(work, backend="aot_eager", fullgraph=True))
    compiled_like_eager(**SMALL, step_mode=step_mode)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_by_inductor_it_gives_what_eager_mode_does() -> None:
    compiled_like_eager(**SMALL)


def on_a_rank(checkpointing: bool) -> dict[str, Tensor]:
    """State of a step with BatchNorm over all ranks after two updates."""
    from mvssl.distributed import join_world

    recipe = replace(RECIPE, sync_batchnorm="both", batch_size=2 * BATCH)
    with join_world(cuda=False) as world:
        step = TrainStep(
            recipe,
            execution=Execution(checkpointing=checkpointing),
            device="cpu",
            total_steps=9,
            steps_per_epoch=3,
            world=world,
        )
        generator = torch.Generator().manual_seed(world.rank)
        for k in range(2):
            step([torch.randn(BATCH, 3, view.size, view.size, generator=generator) for view in recipe.views], k)
        return {name: value.clone() for name, value in step.online.state_dict().items()}


def test_statistics_over_all_ranks_are_those_again_in_the_backward() -> None:
    for kept, again in zip(
        results(run_ranks(on_a_rank, 2, False)), results(run_ranks(on_a_rank, 2, True)), strict=True
    ):
        assert_same(again, kept)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet18", 8),
        ("vit_tiny_patch16_224", 12),
        ("convnext_atto", 2 + 2 + 6 + 2),
        ("regnety_002", 1 + 1 + 4 + 7),
        ("cait_xxs24_224", 24),
        ("resnet18_small", 8),
    ],
)
def test_blocks_of_usual_networks_are_found(name: str, blocks: int) -> None:
    found = find_blocks(build_backbone(Backbone(name=name)))
    if name.startswith("convnext"):
        found = [block for block in found if type(block).__name__ == "ConvNeXtBlock"]
    assert len(found) == blocks


def test_what_cannot_be_recomputed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvssl.models.checkpointing.find_blocks", lambda backbone: [])
    with pytest.raises(InputError, match=r"^RunOptions.checkpointing is True but must be False for test_resnet"):
        make_step(RECIPE, total=9, checkpointing=True)
    cuda = torch.device("cuda")
    assert wants_capture("auto", cuda, ranks=1)
    assert not wants_capture("auto", cuda, ranks=1, restores_random=True)
    with pytest.raises(InputError, match=r"cuda_graph is 'on' but must be auto or off with checkpointing"):
        wants_capture("on", cuda, ranks=1, restores_random=True)


def test_it_is_advised_where_memory_is_short() -> None:
    assert remedies(RECIPE, Execution(), ranks=1)[0].startswith("--checkpointing, ")
    assert not any("--checkpointing" in word for word in remedies(RECIPE, Execution(checkpointing=True), ranks=1))
