"""Batches of several views normalised per view, against sequential forwards of the original layers, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from mvssl.config.options import Execution
from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.models.batchnorm import ForwardViews, find_unbatchable, use_view_batchnorms
from mvssl.models.encoder import Encoder
from mvssl.training.step import TrainStep
from mvssl.weights.backbone_file import export_backbone
from pipelines.views.presets import paper_views
from pipelines.views.spec import ViewSpec
from tests.samples.networks import OwnNorm

IMAGES, CHANNELS = 5, 6
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "vectors": lambda: nn.BatchNorm1d(CHANNELS),
    "maps": lambda: nn.BatchNorm2d(CHANNELS, momentum=0.3, eps=1e-3),
    "without scale and shift": lambda: nn.BatchNorm1d(CHANNELS, affine=False),
    "without statistics": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "timm's with activation": lambda: BatchNormAct2d(CHANNELS, act_layer=nn.SiLU),
    "timm's without": lambda: BatchNormAct2d(CHANNELS, apply_act=False),
}


def layer(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A float64 layer with non-trivial parameters, and the spatial shape of its inputs."""
    made = LAYERS[name]().double()
    generator = torch.Generator().manual_seed(1)
    for tensor in [*made.parameters(), *(b for b in made.buffers() if b.is_floating_point())]:
        tensor.data += 0.3 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return made, () if isinstance(made, nn.BatchNorm1d) else (4, 3)


@pytest.mark.parametrize("formula", [False, True])
@pytest.mark.parametrize("views", [1, 2, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_sequential_forwards(
    name: str, views: int, formula: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, gradients and running statistics; eager (torch's kernel per view) and compiled (our formula)."""
    if formula:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain, size = layer(name)
    ours, current = copy.deepcopy(plain), ForwardViews()
    use_view_batchnorms(ours, current)
    assert type(ours) is not type(plain)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    generator = torch.Generator().manual_seed(2)
    # Every view has its own scale.
    scale = torch.arange(1.0, views + 1).repeat_interleave(IMAGES).view(-1, 1, *[1] * len(size))
    x = scale * torch.randn(views * IMAGES, CHANNELS, *size, generator=generator, dtype=torch.float64)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x_ours, x_plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    current.set(tuple(range(views)), views, first=True)
    y = ours(x_ours)
    monkeypatch.undo()
    expected = torch.cat([plain(view) for view in x_plain.chunk(views)])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_plain.grad, rtol=1e-11, atol=1e-12)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-12)
    for (key, value), other in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12, msg=key)


def test_running_statistics_do_not_depend_on_the_order_of_the_forwards() -> None:
    """Views 0, 1 and 4 have one size, views 2 and 3 another one, whose forward comes first here."""
    plain, _ = layer("vectors")
    ours, current = copy.deepcopy(plain), ForwardViews()
    use_view_batchnorms(ours, current)
    views = [torch.randn(IMAGES, CHANNELS, dtype=torch.float64) * (v + 1) for v in range(5)]
    for positions, first in (((2, 3), True), ((0, 1, 4), False)):
        current.set(positions, 5, first=first)
        ours(torch.cat([views[v] for v in positions]))
    for view in views:
        plain(view)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], value, rtol=1e-12, atol=0)


def test_eval_mode_and_single_views_use_the_original_forward() -> None:
    plain, _ = layer("maps")
    ours, current = copy.deepcopy(plain), ForwardViews()
    use_view_batchnorms(ours, current)
    x = torch.randn(IMAGES, CHANNELS, 4, 3, dtype=torch.float64)
    assert torch.equal(ours(x), plain(x))
    current.set((0, 1), 2, first=True)
    assert torch.equal(ours.eval()(x), plain.eval()(x))


class Whitening(nn.Module):
    """A layer with running statistics that is no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(8))


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2), nn.GroupNorm(1, 2)), None),
        (nn.Sequential(nn.BatchNorm2d(8), OwnNorm(8)), "1 (OwnNorm)"),
        (nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)), "1 (SyncBatchNorm)"),
        (nn.Sequential(Whitening()), "0 (Whitening)"),
        (nn.BatchNorm1d(2, momentum=None), "itself (BatchNorm1d)"),  # a cumulative average
    ],
)
def test_unbatchable_layers_are_found(module: nn.Module, found: str | None) -> None:
    assert find_unbatchable(module) == found


RECIPE = Recipe(
    name="grouped",
    views=paper_views(size=32, local_size=16, blur_kernel=5),
    backbone=Backbone(name="test_resnet"),
    projector=Head(hidden=(24,), out=12),
    predictor=Head(hidden=(20,), out=12),
    optimizer=Optimizer(kind="sgd", base_lr=1.0, warmup_epochs=0),
    epochs=5,
    batch_size=6,
    target_decay=0.9,
    evaluation=Evaluation(resize=32, crop=32),
)


def steps(recipe: Recipe, *, group_views: bool, execution: Execution | None = None) -> tuple[TrainStep, list[Tensor]]:
    """Two updates in float64: the step and its losses."""
    torch.set_default_dtype(torch.float64)
    try:
        step = TrainStep(
            recipe, execution=execution, device="cpu", total_steps=9, steps_per_epoch=2, group_views=group_views
        )
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for k in range(2):
        shapes = [(recipe.batch_size, 3, spec.size, spec.size) for spec in recipe.views]
        views = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        losses.append(step(views, k).losses)
    return step, losses


def assert_same_networks(ours: TrainStep, expected: TrainStep) -> None:
    for network, other in ((ours.online, expected.online), (ours.target, expected.target)):
        for key, value in other.state_dict().items():
            torch.testing.assert_close(network.state_dict()[key], value, rtol=1e-8, atol=1e-11, msg=key)


MANY_SIZES = tuple(replace(spec, size=size) for spec, size in zip(RECIPE.views, (32, 24, 16, 32, 24), strict=True))
NETWORKS: dict[str, dict[str, Any]] = {
    "BatchNormAct2d": {"backbone": Backbone(name="test_efficientnet")},
    "LayerNorm": {
        "backbone": Backbone(name="test_convnext"),
        "views": paper_views(size=64, local_size=32, blur_kernel=5),
    },
    "many sizes": {"views": MANY_SIZES},
    "a size per view": {"views": tuple(replace(spec, size=16 + 8 * v) for v, spec in enumerate(RECIPE.views))},
    "one online view": {
        "views": (
            ViewSpec(name="only", task="global", size=32, blur_kernel=5),
            ViewSpec(name="teacher", task=None, size=32, blur_kernel=5, is_target=True),
        )
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_batched_views_equal_sequential_views(name: str) -> None:
    recipe = replace(RECIPE, **NETWORKS[name])
    (batched, losses), (sequential, expected) = steps(recipe, group_views=True), steps(recipe, group_views=False)
    assert batched.view_by_view is None
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    assert_same_networks(batched, sequential)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step_mode"),
    [
        ("test_resnet", "joint"),
        ("test_efficientnet", "joint"),
        ("resnet10_tiny", "per-view"),
    ],
)
def test_a_compiled_step_equals_the_plain_one(name: str, step_mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused formula in whole networks (residual blocks, stems, norms with activation, heads), in float64."""
    recipe = replace(RECIPE, backbone=Backbone(name=name, init="release"))
    plain, expected = steps(recipe, execution=Execution(step_mode=step_mode), group_views=True)
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="aot_eager", **options))
    torch._dynamo.reset()
    ours, losses = steps(recipe, execution=Execution(step_mode=step_mode, compile="on"), group_views=True)
    assert ours.compiled
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    assert_same_networks(ours, plain)


def calls(recipe: Recipe, execution: Execution | None = None) -> list[tuple[str, int]]:
    """The forwards of a step: the network and the number of images."""
    step = TrainStep(recipe, execution=execution, device="cpu", total_steps=9, steps_per_epoch=2)
    seen: list[tuple[str, int]] = []
    for name, network in (("online", step.online), ("target", step.target)):
        network.backbone.register_forward_pre_hook(lambda _, inputs, name=name: seen.append((name, len(inputs[0]))))
    step([torch.randn(6, 3, spec.size, spec.size) for spec in recipe.views], 0)
    return seen


def test_one_forward_per_size() -> None:
    assert calls(RECIPE) == [("target", 12), ("online", 18), ("online", 12)]
    per_view = calls(RECIPE, Execution(step_mode="per-view"))
    assert per_view == [("target", 6)] * 2 + [("online", 6)] * 5


def test_an_unbatchable_network_embeds_views_one_by_one() -> None:
    recipe = replace(RECIPE, backbone=Backbone(name="mvssl_test_own_norm"))
    assert calls(recipe) == [("target", 6)] * 2 + [("online", 6)] * 5
    step = TrainStep(recipe, device="cpu", total_steps=9, steps_per_epoch=2)
    assert step.view_by_view == "backbone.1 (OwnNorm)"


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_state_dict_and_export_match_timm(name: str, tmp_path: Any) -> None:
    encoder = Encoder(replace(RECIPE, backbone=Backbone(name=name)), drop_path=False)
    plain = timm.create_model(name, num_classes=0)
    assert encoder.backbone.state_dict().keys() == plain.state_dict().keys()
    path = tmp_path / "backbone.safetensors"
    export_backbone(encoder.backbone, name, path)
    loaded = timm.create_model(name, num_classes=0, checkpoint_path=str(path)).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), encoder.backbone.eval()(x))
