"""A multi-task BYOL step in float64 against a plain version: separate MLPs, Python loops, formulas written out."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import pytest
import timm
import torch
from torch import Tensor, nn

from mvssl.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.step import TrainStep
from pipelines.views.presets import paper_views

BATCH, STEPS, WARMUP = 6, 9, 2
TASKS = {"global": (0, 1), "local": (2, 3), "cutout": (4,)}
WEIGHTS = {"global": 1.0, "local": 0.5, "cutout": 1.0}
# The BatchNorm behind the predictor's first layer takes this bias out again, so its true gradient is 0.
ZERO_GRADIENT = "projector.3.bias"
RECIPE = Recipe(
    name="parity",
    views=paper_views(size=32, local_size=16, blur_kernel=5),
    task_weights={"local": 0.5},
    backbone=Backbone(name="test_resnet"),
    projector=Head(hidden=(24,), out=12),
    predictor=Head(hidden=(20, 16), out=12),
    optimizer=Optimizer(kind="lars", base_lr=20.0, weight_decay=1e-3, eta=0.01, warmup_epochs=1, final_lr_factor=0.001),
    epochs=5,
    batch_size=BATCH,
    target_decay=0.9,
    evaluation=Evaluation(resize=32, crop=32),
)


def plain_mlp(width: int, hidden: tuple[int, ...], out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, out))


@dataclass
class Plain:
    """The networks of the plain version."""

    backbone: nn.Module
    projector: nn.Module
    predictors: list[nn.Module]
    target_backbone: nn.Module
    target_projector: nn.Module

    def online_parameters(self) -> dict[str, Tensor]:
        named = {f"backbone.{name}": p for name, p in self.backbone.named_parameters()}
        named |= {f"projector.{name}": p for name, p in self.projector.named_parameters()}
        for slot, predictor in enumerate(self.predictors):
            named |= {f"predictor {slot}.{name}": p for name, p in predictor.named_parameters()}
        return named

    def target_parameters(self) -> dict[str, Tensor]:
        named = {f"backbone.{name}": p for name, p in self.target_backbone.named_parameters()}
        return named | {f"projector.{name}": p for name, p in self.target_projector.named_parameters()}


def unstack(tensors: dict[str, Tensor], slots: int) -> dict[str, Tensor]:
    """Rename the bank's tensors to those of separate MLPs; a weight [in, out] of a slot is a Linear's transposed."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith("predictors.layers."):
            plain[name] = tensor
            continue
        for slot in range(slots):
            single = tensor[slot]
            plain[f"predictor {slot}.{name.removeprefix('predictors.layers.')}"] = (
                single.T if single.dim() == 2 else single
            )
    return plain


def make_plain(step: TrainStep, slots: int) -> Plain:
    state = unstack(step.online.state_dict(), slots)

    def part(prefix: str, source: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in source.items() if name.startswith(prefix)}

    plain = Plain(
        backbone=timm.create_model("test_resnet", num_classes=0),
        projector=plain_mlp(96, (24,), 12),
        predictors=[plain_mlp(12, (20, 16), 12) for _ in range(slots)],
        target_backbone=timm.create_model("test_resnet", num_classes=0),
        target_projector=plain_mlp(96, (24,), 12),
    )
    for module, values in (
        (plain.backbone, part("backbone.", state)),
        (plain.projector, part("projector.", state)),
        *((predictor, part(f"predictor {slot}.", state)) for slot, predictor in enumerate(plain.predictors)),
        (plain.target_backbone, part("backbone.", step.target.state_dict())),
        (plain.target_projector, part("projector.", step.target.state_dict())),
    ):
        module.double().train()
        module.load_state_dict(copy.deepcopy(values))
    return plain


def plain_loss(plain: Plain, views: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Loss of each task and the weighted total."""
    with torch.no_grad():
        targets = {t: plain.target_projector(plain.target_backbone(views[t])) for t in (0, 1)}
    losses: dict[str, Tensor] = {}
    for number, (task, members) in enumerate(TASKS.items()):
        predictor = plain.predictors[number if len(plain.predictors) > 1 else 0]
        terms = []
        for v in members:
            p = predictor(plain.projector(plain.backbone(views[v])))
            for t in (0, 1):
                if t != v:
                    cosine = (p * targets[t]).sum(1) / (p.pow(2).sum(1).sqrt() * targets[t].pow(2).sum(1).sqrt())
                    terms.append((2 - 2 * cosine).mean())
        losses[task] = sum(terms) / len(terms)
    return losses, sum(WEIGHTS[task] * loss for task, loss in losses.items())


def plain_update(plain: Plain, buffers: dict[str, Tensor], lr: float) -> None:
    """LARS, one parameter after the other, with Python scalars."""
    for name, p in plain.online_parameters().items():
        update = p.grad.clone()
        if p.dim() > 1:
            update += 1e-3 * p.detach()
            size, length = p.detach().norm().item(), update.norm().item()
            update *= 0.01 * size / length if size > 0 and length > 0 else 1.0
        buffers[name] = 0.9 * buffers.get(name, torch.zeros_like(p)) + update
        p.data -= lr * buffers[name]


def assert_close(ours: dict[str, Tensor], plain: dict[str, Tensor], *, gradient: bool = False) -> None:
    """Every tensor equals its counterpart to a relative error (of norms) of 1e-10."""
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        if name == ZERO_GRADIENT and gradient:
            assert max(ours[name].norm(), expected.norm()) < 1e-13
            continue
        scale = expected.double().norm().item() or 1.0
        error = (ours[name].double() - expected.double()).norm().item() / scale
        assert error <= 1e-10, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("step_mode", ["joint", "per-view"])
@pytest.mark.parametrize("predictors", ["per-view", "shared"])
def test_step_equals_plain_version(step_mode: str, predictors: str) -> None:
    recipe = replace(RECIPE, step_mode=step_mode, predictors=predictors)
    step = TrainStep(recipe, device="cpu", total_steps=STEPS, steps_per_epoch=WARMUP)
    slots = 3 if predictors == "per-view" else 1
    generator = torch.Generator().manual_seed(5)
    for network in (step.online.double(), step.target.double()):
        for p in network.parameters():  # away from the zeros and ones of the initialisation; the target differs
            p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    gradients: dict[str, Tensor] = {}
    step.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in step.online.named_parameters()})
    )
    plain, buffers = make_plain(step, slots), {}

    for k in (1, 2, 5):  # in the warm-up, at the peak, on the cosine
        views = [torch.randn(BATCH, 3, spec.size, spec.size, generator=generator).double() for spec in recipe.views]
        output = step(views, k)

        decay = 1 - 0.1 * (1 + math.cos(math.pi * k / STEPS)) / 2
        for name, p in plain.target_parameters().items():  # before the forward
            p.data = decay * p.data + (1 - decay) * plain.online_parameters()[name].data
        losses, total = plain_loss(plain, views)
        for p in plain.online_parameters().values():
            p.grad = None
        total.backward()

        assert output.loss.item() == pytest.approx(total.item(), rel=1e-10)
        torch.testing.assert_close(output.losses, torch.stack(list(losses.values())).detach(), rtol=1e-10, atol=0)
        assert_close(
            unstack(gradients, slots), {name: p.grad for name, p in plain.online_parameters().items()}, gradient=True
        )
        norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in plain.online_parameters().values()))
        assert output.grad_norm.item() == pytest.approx(norm, rel=1e-9)

        q = (1 + math.cos(math.pi * (k - WARMUP) / (STEPS - WARMUP))) / 2
        lr = (20.0 * BATCH / 256) * (k / WARMUP if k < WARMUP else q + 0.001 * (1 - q))
        assert output.lr == pytest.approx(lr, rel=1e-12)
        plain_update(plain, buffers, lr)

    assert_close(unstack(dict(step.online.named_parameters()), slots), plain.online_parameters())
    assert_close(dict(step.target.named_parameters()), plain.target_parameters())
    expected = {f"backbone.{n}": b for n, b in plain.backbone.named_buffers()}
    expected |= {f"projector.{n}": b for n, b in plain.projector.named_buffers()}
    for slot, predictor in enumerate(plain.predictors):
        expected |= {f"predictor {slot}.{n}": b for n, b in predictor.named_buffers()}
    assert_close(unstack(dict(step.online.named_buffers()), slots), expected)
    expected = {f"backbone.{n}": b for n, b in plain.target_backbone.named_buffers()}
    expected |= {f"projector.{n}": b for n, b in plain.target_projector.named_buffers()}
    assert_close(dict(step.target.named_buffers()), expected)


def test_embedding_is_the_projection_of_the_first_view() -> None:
    step = TrainStep(RECIPE, device="cpu", total_steps=STEPS, steps_per_epoch=WARMUP)
    views = [torch.randn(BATCH, 3, spec.size, spec.size) for spec in RECIPE.views]
    expected = copy.deepcopy(step.online)(views[0]).detach()
    embedding = step(views, 1).embedding
    torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)
    assert not embedding.requires_grad
