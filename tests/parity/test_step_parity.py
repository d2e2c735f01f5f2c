"""The training step in float64 against the plain version of `plain.py`: losses, gradients, rates, weights, statistics.

Every case is a published recipe made small. How its losses are weighted is written here once more, as PAPER.md section
4 says it: with sums and halves, not with the recipe's task weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mvssl.recipes
from mvssl.config.options import Execution
from mvssl.config.recipe import Backbone, Evaluation, Head, Recipe
from mvssl.training.step import TrainStep
from pipelines.views.presets import asymmetric, paper_views
from pipelines.views.spec import ViewSpec
from tests.samples.plain import Plain, Terms

METHODS = ("byol", "simsiam", "mocov3")
BATCH, STEPS, STEPS_PER_EPOCH = 6, 9, 2
# How views go through the networks: those of a size as one batch, one by one in one graph, one graph for each.
PASSES: dict[str, tuple[Any, bool]] = {
    "grouped": ("joint", True),
    "joint": ("joint", False),
    "per-view": ("per-view", True),
}
WIDTHS = {"test_resnet": 96, "test_vit": 64}
# Rates with which three updates move the weights far enough to tell a wrong update from a right one.
RATES: dict[str, dict[str, Any]] = {
    "lars": {"base_lr": 20.0, "weight_decay": 1e-3, "eta": 0.01},
    "sgd": {"base_lr": 4.0, "weight_decay": 1e-2},
    "adamw": {"base_lr": 0.2, "weight_decay": 0.1},
}


def small(recipe: Recipe, *, backbone: str = "test_resnet", **changes: Any) -> Recipe:
    """A recipe with its structure and small sizes: 32 pixels for 224 and 16 for 96, heads 12 to 24 wide."""

    def head(big: Head) -> Head:
        return replace(big, hidden=(24, 20)[: len(big.hidden)], out=12)

    optimizer = recipe.optimizer
    return replace(
        recipe,
        views=tuple(replace(spec, size={224: 32, 96: 16}[spec.size], blur_kernel=5) for spec in recipe.views),
        backbone=Backbone(name=backbone),
        projector=head(recipe.projector),
        predictor=head(recipe.predictor),
        optimizer=replace(optimizer, warmup_epochs=min(optimizer.warmup_epochs, 1), **RATES[optimizer.kind]),
        epochs=5,
        batch_size=BATCH,
        target_decay=0.9,
        evaluation=Evaluation(resize=32, crop=32),
        **changes,
    )


def published(method: str, setting: str) -> Recipe:
    """The recipe of a method: multi-task, with two views, or with one prediction of two views."""
    name = f"{method}_resnet50_200ep"
    if setting == "multi-task":
        return small(mvssl.recipes.get_recipe(name))
    recipe = small(mvssl.recipes.get_recipe(f"{name}_two_view"))
    return recipe if setting == "two-view" else replace(recipe, views=asymmetric(recipe.views))


def written_out(method: str, setting: str) -> Callable[[Terms], Tensor]:
    """The whole loss from the losses of the pairs, as PAPER.md section 4 says it."""

    def total(terms: Terms) -> Tensor:
        if setting == "asymmetric":
            return {"byol": 2.0, "simsiam": 1.0, "mocov3": 2.0}[method] * terms[0, 1]
        if setting == "two-view":
            both = terms[0, 1] + terms[1, 0]
            return both / 2 if method == "simsiam" else both
        of_globals = (terms[0, 1] + terms[1, 0]) / 2
        of_locals = (terms[2, 0] + terms[2, 1] + terms[3, 0] + terms[3, 1]) / 4
        of_cutout = (terms[4, 0] + terms[4, 1]) / 2
        return (of_globals + of_locals + of_cutout) / (3 if method == "simsiam" else 1)

    return total


@contextmanager
def float64() -> Iterator[None]:
    """Build everything inside in double precision."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def unstack(values: dict[str, Any]) -> dict[str, Any]:
    """Rename the bank's entries to those of separate MLPs; a weight [in, out] of a slot is a Linear's transposed."""
    plain: dict[str, Any] = {}
    for name, tensor in values.items():
        if not name.startswith("predictors.layers."):
            plain[name] = tensor
            continue
        for slot, single in enumerate(tensor):
            plain[f"predictors.{slot}.{name.removeprefix('predictors.layers.')}"] = (
                single.T if single.dim() == 2 else single
            )
    return plain


def truly_zero(recipe: Recipe) -> frozenset[str]:
    """Gradients and statistics that are 0 but for rounding, because a BatchNorm takes out what comes before it.

    Gradients of shifts in front of a BatchNorm; means of a linear map (without bias) of a BatchNorm's output.
    """
    names = {f"projector.{3 * len(recipe.projector.hidden)}.bias"}  # its own, or that of the predictor's first layer
    if "vit" in recipe.backbone.name:
        names |= {"backbone.norm.bias"}
    for slot in range(4):
        if recipe.predictor.output_norm:
            names |= {f"predictors.{slot}.{3 * len(recipe.predictor.hidden)}.bias"}
        if recipe.projector.output_norm:
            names |= {f"predictors.{slot}.1.running_mean"}
    return frozenset(names)


def assert_close(ours: dict[str, Tensor], plain: dict[str, Tensor], *, zeros: frozenset[str] = frozenset()) -> None:
    """Every tensor equals its counterpart to a relative error (of norms) of 1e-10; those of `zeros` are both 0."""
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        if name in zeros:
            assert max(ours[name].norm(), expected.norm()) < 1e-13
            continue
        scale = expected.double().norm().item() or 1.0
        error = (ours[name].double() - expected.double()).norm().item() / scale
        assert error <= 1e-10, f"{name}: relative error {error:.2e}"


def twins(
    recipe: Recipe, total: Callable[[Terms], Tensor], *, group_views: bool, step_mode: Any
) -> tuple[TrainStep, Plain, torch.Generator]:
    """Our step and the plain version with the same weights, away from the zeros and ones of the initialisation."""
    with float64():
        step = TrainStep(
            recipe,
            execution=Execution(step_mode=step_mode),
            device="cpu",
            total_steps=STEPS,
            steps_per_epoch=STEPS_PER_EPOCH,
            group_views=group_views,
        )
    generator = torch.Generator().manual_seed(5)
    for network in (step.online, step.target):
        for p in () if network is None else network.parameters():  # a moving average begins elsewhere
            p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    plain = Plain(
        recipe,
        width=WIDTHS[recipe.backbone.name],
        steps=STEPS,
        steps_per_epoch=STEPS_PER_EPOCH,
        total=total,
    )
    plain.online.load_state_dict(copy.deepcopy(unstack(step.online.state_dict())))
    if recipe.method != "simsiam":  # whose second network is copied before each step
        plain.target.load_state_dict(copy.deepcopy(step.target.state_dict()))
    return step, plain, generator


def check(
    recipe: Recipe, total: Callable[[Terms], Tensor], *, group_views: bool = True, step_mode: Any = "joint"
) -> tuple[TrainStep, list[float]]:
    """Three updates of both versions, compared all the way; our step and the gradient's norms."""
    step, plain, generator = twins(recipe, total, group_views=group_views, step_mode=step_mode)
    gradients: dict[str, Tensor] = {}
    rates: dict[str, tuple[float, float]] = {}

    def record(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients.update({name: p.grad.clone() for name, p in step.online.named_parameters()})
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, p in step.online.named_parameters():
            group = group_of[id(p)]
            pair = (float(group["lr"]), float(group.get("decay", group["weight_decay"])))
            slots = len(p) if name.startswith("predictors.") else 1
            singles = [name.replace("predictors.layers", f"predictors.{slot}") for slot in range(slots)]
            rates.update(dict.fromkeys(singles, pair))

    step.optimizer.register_step_pre_hook(record)
    norms, zeros = [], truly_zero(recipe)
    for k in (1, 2, 5):  # in the warm-up, at the peak, on the cosine
        views = [
            torch.randn(BATCH, 3, spec.size, spec.size, generator=generator, dtype=torch.float64)
            for spec in recipe.views
        ]
        output, expected = step(views, k), plain.step(views, k)

        assert output.loss.item() == pytest.approx(expected.total.item(), rel=1e-10)
        torch.testing.assert_close(output.losses, expected.losses, rtol=1e-10, atol=0)
        assert_close(unstack(gradients), expected.gradients, zeros=zeros)
        assert output.grad_norm.item() == pytest.approx(expected.norm, rel=1e-9)
        norms.append(expected.norm)
        assert rates.keys() == expected.rates.keys()
        for name, pair in expected.rates.items():
            assert rates[name] == pytest.approx(pair, rel=1e-12), name
        assert output.lr == pytest.approx(expected.rates["projector.0.weight"][0], rel=1e-12)

    assert_close(unstack(dict(step.online.named_parameters())), dict(plain.online.named_parameters()))
    assert_close(unstack(dict(step.online.named_buffers())), dict(plain.online.named_buffers()), zeros=zeros)
    if step.target is not None:
        assert_close(dict(step.target.named_parameters()), dict(plain.target.named_parameters()))
        assert_close(dict(step.target.named_buffers()), dict(plain.target.named_buffers()))
    return step, norms


@pytest.mark.slow
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("predictors", ["per-view", "shared"])
@pytest.mark.parametrize("setting", ["multi-task", "two-view", "asymmetric"])
@pytest.mark.parametrize("method", METHODS)
def test_step_equals_plain_version(method: str, setting: str, predictors: Any, passes: str) -> None:
    """Each method with its published optimiser: LARS, or SGD with rates set once an epoch and constant predictors.

    SimSiam keeps a second network only for a view that the online network does not embed.
    """
    step_mode, group_views = PASSES[passes]
    recipe = replace(published(method, setting), predictors=predictors)
    step, _ = check(recipe, written_out(method, setting), group_views=group_views, step_mode=step_mode)
    assert (step.target is None) == (method == "simsiam" and setting != "asymmetric")
    slots = 3 if (setting, predictors) == ("multi-task", "per-view") else 1
    assert len(step.online.predictors.tasks) == slots


@pytest.fixture
def exact_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Position embeddings interpolated in float64; timm does it in float32, and rounds once for all views of a size."""

    def resample(embedding: Tensor, new_size: list[int], old_size: list[int], num_prefix_tokens: int) -> Tensor:
        prefix, grid = embedding[:, :num_prefix_tokens], embedding[:, num_prefix_tokens:]
        images = grid.reshape(1, *old_size, -1).permute(0, 3, 1, 2)
        images = torch.nn.functional.interpolate(images, size=new_size, mode="bicubic", antialias=True)
        return torch.cat([prefix, images.flatten(2).mT], dim=1)

    monkeypatch.setattr("timm.models.vision_transformer.resample_abs_pos_embed", resample)


@pytest.mark.usefixtures("exact_positions")
@pytest.mark.parametrize("step_mode", ["joint", "per-view"])
def test_adamw_with_clipping_and_rates_of_its_own_for_biases(step_mode: str) -> None:
    """The paper's vision transformer recipe (without its random stochastic depth) and the optional rates."""
    recipe = small(mvssl.recipes.byol_vits16_200ep(), backbone="test_vit")
    optimizer = replace(recipe.optimizer, bias_lr=0.05, weight_decay_end=0.4)
    assert (optimizer.kind, optimizer.clip_grad_norm) == ("adamw", 0.5)
    _, norms = check(replace(recipe, optimizer=optimizer), written_out("byol", "multi-task"), step_mode=step_mode)
    assert min(norms) > 0.5  # every update was clipped


@pytest.mark.parametrize(("method", "step_mode"), [("byol", "per-view"), ("simsiam", "joint"), ("mocov3", "per-view")])
def test_more_views_another_weight_and_another_temperature(method: str, step_mode: Any) -> None:
    """Three local views at half weight and one global view more, a task of its own."""
    recipe = replace(
        published(method, "multi-task"),
        views=paper_views(num_local=3, num_global_more=1, size=32, local_size=16, blur_kernel=5),
        task_weights={"local": 0.5},
        temperature=0.2 if method == "mocov3" else None,
    )

    def total(terms: Terms) -> Tensor:
        of_globals = (terms[0, 1] + terms[1, 0]) / 2
        of_locals = sum(terms[v, t] for v in (2, 3, 4) for t in (0, 1)) / 6
        of_cutout = (terms[5, 0] + terms[5, 1]) / 2
        of_more = (terms[6, 0] + terms[6, 1]) / 2
        return of_globals + 0.5 * of_locals + of_cutout + of_more

    check(recipe, total, step_mode=step_mode)


@pytest.mark.parametrize(("method", "step_mode"), [("byol", "joint"), ("simsiam", "per-view"), ("mocov3", "joint")])
def test_a_view_type_of_ones_own_that_is_a_target_too(method: str, step_mode: Any) -> None:
    """A third target, of a size of its own, behind the local view: all views predict it and it predicts the globals."""
    own = ViewSpec(name="own", task="own", size=24, blur_kernel=5, is_target=True)
    recipe = replace(
        published(method, "multi-task"),
        views=(*paper_views(num_local=1, num_cutout=0, size=32, local_size=16, blur_kernel=5), own),
        task_weights={"own": 3.0},
    )

    def total(terms: Terms) -> Tensor:
        of_globals = (terms[0, 1] + terms[0, 3] + terms[1, 0] + terms[1, 3]) / 4
        of_local = (terms[2, 0] + terms[2, 1] + terms[2, 3]) / 3
        of_own = (terms[3, 0] + terms[3, 1]) / 2
        return of_globals + of_local + 3 * of_own

    check(recipe, total, step_mode=step_mode)


def test_embedding_is_the_projection_of_the_first_view() -> None:
    """What the step hands to the diagnostics of collapse."""
    recipe = published("byol", "multi-task")
    step = TrainStep(recipe, device="cpu", total_steps=STEPS, steps_per_epoch=STEPS_PER_EPOCH)
    views = [torch.randn(BATCH, 3, spec.size, spec.size) for spec in recipe.views]
    expected = copy.deepcopy(step.online)(views[0]).detach()
    embedding = step(views, 1).embedding
    torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)
    assert not embedding.requires_grad
