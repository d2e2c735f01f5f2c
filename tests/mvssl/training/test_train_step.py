"""The training step's promises beyond its numbers: seeds, modes, state, precision, messages."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.models.encoder import build_networks, initial_backbone
from mvssl.training.step import StepOutput, TrainStep
from pipelines.runtime import InputError
from pipelines.views.presets import paper_views
from pipelines.views.spec import ViewSpec
from tests.samples.tiny_runs import make_step

RECIPE = Recipe(
    name="small",
    views=paper_views(size=64, local_size=32, blur_kernel=5),
    backbone=Backbone(name="test_resnet"),
    projector=Head(hidden=(24,), out=12),
    predictor=Head(hidden=(20,), out=12),
    optimizer=Optimizer(base_lr=3.0, warmup_epochs=1),
    epochs=5,
    batch_size=4,
    seed=3,
    evaluation=Evaluation(resize=64, crop=64),
)


def make(device: str = "cpu", **changes: Any) -> TrainStep:
    return make_step(RECIPE, device=device, total=10, **changes)


def batch(seed: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, spec.size, spec.size, generator=generator).to(device) for spec in RECIPE.views]


def test_initial_weights_are_the_seeds() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    online, target = build_networks(RECIPE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    shared, _ = build_networks(replace(RECIPE, predictors="shared"))
    assert shared.predictors.tasks == ("shared",)
    other, _ = build_networks(replace(RECIPE, seed=4))
    for name, p in online.named_parameters():
        if not name.startswith("predictors"):
            assert torch.equal(p, shared.state_dict()[name])
            assert torch.equal(p, target.state_dict()[name])
    weights = online.state_dict()
    assert not torch.equal(weights["projector.0.weight"], other.state_dict()["projector.0.weight"])
    assert torch.equal(initial_backbone(RECIPE).state_dict()["conv1.0.weight"], weights["backbone.conv1.0.weight"])
    assert not any(p.requires_grad for p in target.parameters())
    assert target.training


def test_state_goes_on_bitwise() -> None:
    whole, first, second = make(), make(), make(seed=9)
    for k in range(2):
        whole(batch(k), k)
        first(batch(k), k)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for k in range(2, 4):
        a, b = whole(batch(k), k), second(batch(k), k)
        first(batch(k + 50), k)  # must not reach into what `second` was given
        assert torch.equal(a.losses, b.losses)
        assert torch.equal(a.grad_norm, b.grad_norm)
    for name, value in whole.online.state_dict().items():
        assert torch.equal(value, second.online.state_dict()[name])
    for name, value in whole.target.state_dict().items():
        assert torch.equal(value, second.target.state_dict()[name])


def test_state_is_copied() -> None:
    first, second = make(), make()
    first(batch(0), 1)
    second.load_state_dict(first.state_dict())
    buffer = second.optimizer.state[next(second.online.parameters())]["momentum_buffer"].clone()
    first(batch(1), 2)
    assert torch.equal(second.optimizer.state[next(second.online.parameters())]["momentum_buffer"], buffer)


@pytest.mark.parametrize("kind", ["lars", "sgd", "adamw"])
def test_loss_falls_on_one_batch(kind: Any) -> None:
    lr = {"lars": 20.0, "sgd": 2.0, "adamw": 0.2}[kind]
    step = TrainStep(
        replace(RECIPE, optimizer=Optimizer(kind=kind, base_lr=lr, warmup_epochs=0)),
        device="cpu",
        total_steps=30,
        steps_per_epoch=6,
    )
    outputs = [step(batch(0), k) for k in range(12)]
    assert outputs[-1].loss < 0.6 * outputs[0].loss


def test_clipping_limits_the_gradient() -> None:
    steps = [
        make(
            optimizer=Optimizer(
                kind="sgd", base_lr=64, clip_grad_norm=clip, weight_decay=0, momentum=0, warmup_epochs=1
            )
        )
        for clip in (None, 0.5)
    ]
    moved: list[Tensor] = []
    for step in steps:
        before = [p.detach().clone() for p in step.online.parameters()]
        output = step(batch(0), 4)
        assert output.grad_norm > 1.0  # before clipping
        moved.append(
            torch.cat([(p.detach() - old).flatten() for p, old in zip(step.online.parameters(), before, strict=True)])
        )
    assert moved[1].norm().item() == pytest.approx(0.5 * output.lr, rel=1e-3)
    assert torch.cosine_similarity(moved[0], moved[1], dim=0).item() == pytest.approx(1.0, abs=1e-5)


def test_bf16_is_near_fp32() -> None:
    exact, low = make(), make(precision="bf16")
    assert low.input_dtype == low.autocast_dtype == torch.bfloat16
    output = low(batch(0), 1)
    assert output.losses.dtype == torch.float32
    # Each loss lies in [0, 4]; bfloat16 has 8 bits, a relative error of 2**-9 per operation.
    torch.testing.assert_close(output.losses, exact(batch(0), 1).losses, rtol=0, atol=0.05)
    assert output.grad_norm.isfinite()
    assert all(p.dtype == torch.float32 for p in low.online.parameters())


def test_channels_last_changes_the_layout_and_not_the_numbers() -> None:
    on, off = make(channels_last=True), make(channels_last=False)
    name = "backbone.conv1.3.weight"
    assert on.online.state_dict()[name].is_contiguous(memory_format=torch.channels_last)
    assert off.online.state_dict()[name].is_contiguous()
    torch.testing.assert_close(on(batch(0), 1).losses, off(batch(0), 1).losses, rtol=1e-4, atol=1e-5)


def test_target_only_view_is_embedded_by_the_target_alone() -> None:
    clean = ViewSpec(name="clean", task=None, is_target=True, size=64, blur_kernel=5)
    views = (clean, *(replace(spec, is_target=False) for spec in RECIPE.views))
    outputs: list[StepOutput] = []
    for step_mode in ("joint", "per-view"):
        step = make(views=views, step_mode=step_mode)
        outputs.append(step([batch(7)[0], *batch(0)], 1))
        assert step.online.projector[1].num_batches_tracked == 5
        assert step.target.projector[1].num_batches_tracked == 1
    torch.testing.assert_close(outputs[0].losses, outputs[1].losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs[0].embedding, outputs[1].embedding, rtol=1e-5, atol=1e-5)


def test_drop_path_is_for_the_online_network_only() -> None:
    step = make(backbone=Backbone(name="test_vit", drop_path=0.5), evaluation=Evaluation(resize=64, crop=64))
    view = batch(0)[0]
    with torch.no_grad():
        assert not torch.equal(step.online.backbone(view), step.online.backbone(view))
        assert torch.equal(step.target.backbone(view), step.target.backbone(view))


def test_simsiam_copies_a_target_without_buffers() -> None:
    """Stochastic depth gives SimSiam a target network; without BatchNorm there are only parameters to copy."""
    heads = replace(RECIPE.projector, norm="layer")
    step = make(
        method="simsiam", backbone=Backbone(name="test_vit", drop_path=0.5), projector=heads, predictor=RECIPE.predictor
    )
    assert not list(step.target.buffers())
    step(batch(0), 3)
    moved = step.online.state_dict()["projector.0.weight"].clone()
    step(batch(1), 4)
    assert torch.equal(step.target.state_dict()["projector.0.weight"], moved)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match=r"Recipe.precision is 'fp16' but must be fp32 or bf16 on a cpu"):
        make(precision="fp16")
    with pytest.raises(InputError, match=r"must be fp32 on the CPU for views of 16 pixels"):
        make(precision="bf16", views=paper_views(size=64, local_size=16, blur_kernel=5))
    with pytest.raises(InputError, match="views has 2 tensors but must have 5"):
        make()(batch(0)[:2], 0)
    with pytest.raises(InputError, match="cannot take views of 40 pixels"):
        make(backbone=Backbone(name="vit_tiny_patch16_224"), views=paper_views(size=64, local_size=40))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "fp16"},
        {"precision": "fp32"},
        {"compile": "on"},
        {"method": "simsiam"},
        {"method": "mocov3", "temperature": 1.0},
        {"method": "mocov3", "temperature": 1.0, "precision": "fp16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("step_mode", ["joint", "per-view"])
def test_cuda_follows_the_cpu(changes: dict[str, Any], step_mode: str) -> None:
    torch._dynamo.reset()
    ours = make("cuda", **{"compile": "off"} | changes, step_mode=step_mode)
    reference = make(**{name: value for name, value in changes.items() if name in ("method", "temperature")})
    for k in range(3):
        with torch.cuda.stream(torch.cuda.current_stream()):
            views = batch(k, "cuda")
            torch.cuda.synchronize()
            if k:  # the first step may compile; later ones must not wait for the device
                torch.cuda.set_sync_debug_mode("error")
            try:
                output = ours(views, k)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        expected = reference(batch(k), k)
        torch.testing.assert_close(output.losses.cpu(), expected.losses, rtol=0, atol=0.08)
