"""Training steps of other libraries for a BYOL or SimSiam recipe: their heads, losses, averages and optimisers.

The backbone is the recipe's, so that only what the libraries bring differs. All are eager, as their examples are.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.processes import Trials
from benchmarks.implementations.loaders import needs
from benchmarks.implementations.peers import PEERS
from benchmarks.implementations.steps import TOTAL, Setup, loading, noise, trials_of
from mvssl.config.device import autocast_dtype
from mvssl.config.recipe import Recipe
from mvssl.models.backbones import build_backbone, feature_width
from mvssl.models.view_batching import task_pairs
from mvssl.optim import ema_momentum
from pipelines.runtime import InputError

Step = Callable[[Sequence[Tensor], int], Tensor]
"""Trains on V views [B, 3, S, S] as update number n; the loss, [] detached."""


def lightly_step(recipe: Recipe) -> Step:
    """BYOL or SimSiam of lightly's modules, in the loop of its examples, over all pairs of views of the recipe."""
    heads, loss = importlib.import_module("lightly.models.modules"), importlib.import_module("lightly.loss")
    utils = importlib.import_module("lightly.models.utils")
    backbone, width = _backbone(recipe)
    (hidden, *_), out = recipe.projector.hidden, recipe.projector.out
    (narrow, *_) = recipe.predictor.hidden
    byol = recipe.method == "byol"
    make_projector = heads.BYOLProjectionHead if byol else heads.SimSiamProjectionHead
    make_predictor = heads.BYOLPredictionHead if byol else heads.SimSiamPredictionHead
    online = nn.ModuleDict(
        {
            "backbone": backbone,
            "projector": make_projector(width, hidden, out),
            "predictor": make_predictor(out, narrow, out),
        }
    ).train()
    target = (
        copy.deepcopy(nn.ModuleDict({name: online[name] for name in ("backbone", "projector")})) if byol else online
    )
    if byol:
        utils.deactivate_requires_grad(target)
    optimizer = _optimizer(online, recipe, importlib.import_module("lightly.utils.lars").LARS)
    criterion, tasks = loss.NegativeCosineSimilarity(), task_pairs(recipe.views, recipe.task_weights)

    def step(views: Sequence[Tensor], number: int) -> Tensor:
        if byol:
            momentum = ema_momentum(number, TOTAL, recipe.target_decay)
            for name in ("backbone", "projector"):
                utils.update_momentum(online[name], target[name], m=momentum)
        pairs = [(pair, task.weight / len(task.pairs)) for task in tasks for pair in task.pairs]
        embedded = {v: online["projector"](online["backbone"](views[v])) for v in sorted({v for (v, _), _ in pairs})}
        predicted = {v: online["predictor"](z) for v, z in embedded.items()}
        with torch.no_grad():
            wanted = sorted({t for (_, t), _ in pairs})
            targets = {
                t: target["projector"](target["backbone"](views[t])) if byol else embedded[t].detach() for t in wanted
            }
        total = sum(weight * criterion(predicted[v], targets[t]) for (v, t), weight in pairs)
        return _update(total, optimizer)

    return step


def stable_step(recipe: Recipe) -> Step:
    """BYOL of stable-pretraining, which takes two views.

    Raises:
        InputError: the recipe has more views, or another method.
    """
    if recipe.method != "byol" or len(recipe.views) != 2:
        raise InputError("stable-pretraining's BYOL takes two views: name a two-view recipe of BYOL to measure it.")
    module = importlib.import_module("stable_pretraining.methods.byol")
    backbone, _ = _backbone(recipe)
    model = module.BYOL(
        backbone,
        projector_dims=(recipe.projector.hidden[0], recipe.projector.out),
        predictor_dims=(recipe.predictor.hidden[0], recipe.predictor.out),
        ema_decay_start=recipe.target_decay,
    ).train()
    optimizer = _optimizer(model, recipe, None)

    def step(views: Sequence[Tensor], number: int) -> Tensor:
        del number
        loss = _update(model(*views).loss, optimizer)
        model.backbone.update_teacher()
        model.projector.update_teacher()
        return loss

    return step


PEER_STEPS: dict[str, Callable[[Recipe], Step]] = {"lightly": lightly_step, "stable-pretraining": stable_step}
"""Steps by the names of their rows; solo-learn's needs Lightning 1.4, and lightly-train has neither method."""


@contextmanager
def peer_steps(setup: Setup, name: str) -> Iterator[Trials]:
    """The step of a library on the same batch of noise, with the recipe's backbone."""
    PEERS[name].version()
    if setup.device != "cpu" or autocast_dtype(setup.recipe.precision, torch.device("cpu")) is not None:
        raise InputError(f"{name}'s step is measured in fp32 on the CPU only: take --device cpu.")
    with needs(f"reinstall {name} to measure it"):
        step = PEER_STEPS[name](setup.recipe)
    views = noise(setup, torch.float32, torch.contiguous_format)
    with loading(setup) as batches:
        yield trials_of(name, setup, lambda number: step(views, number), warm_up=1, check=lambda: None, batches=batches)


def _backbone(recipe: Recipe) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    backbone = build_backbone(recipe.backbone, drop_path=True)
    return backbone, feature_width(backbone, {view.size for view in recipe.views}, name=recipe.backbone.name)


def _optimizer(model: nn.Module, recipe: Recipe, lars: Any) -> torch.optim.Optimizer:
    """The recipe's kind at a small constant rate; SGD where the library has no LARS."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind, rate = recipe.optimizer.kind, 1e-3
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=recipe.optimizer.weight_decay)
    make = lars if kind == "lars" and lars is not None else torch.optim.SGD
    made: torch.optim.Optimizer = make(parameters, lr=rate, momentum=0.9, weight_decay=recipe.optimizer.weight_decay)
    return made


def _update(loss: Any, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    detached: Tensor = loss.detach()
    return detached
