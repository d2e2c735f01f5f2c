"""A training step as it is commonly written: eager, NCHW, one module per predictor, loops over views and parameters.

A baseline for the same recipes, with the numbers of `mvssl.training.step` up to rounding (tested). It has autocast and
both step modes, but no compilation, channels-last memory, batched views, stacked predictors or fused updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from mvssl.config.device import autocast_dtype
from mvssl.config.recipe import Optimizer, Recipe
from mvssl.methods import get_method
from mvssl.models.backbones import build_backbone, feature_width
from mvssl.models.encoder import OnlineNetwork
from mvssl.models.heads import MLP
from mvssl.models.view_batching import online_views, predictor_slots, target_views, task_pairs
from mvssl.optim import apply_rates, ema_momentum
from mvssl.training.step import needs_target_network
from pipelines.runtime import invalid
from pipelines.views.spec import tasks


class PlainLARS(torch.optim.Optimizer):
    """LARS (PAPER.md section 5) parameter by parameter."""

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, momentum: float, eta: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss to return
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                change = p.grad
                if not group["vector"]:
                    change = change.add(p, alpha=group["weight_decay"])
                    size, length = torch.norm(p), torch.norm(change)
                    change = change * torch.where((size > 0) & (length > 0), group["eta"] * size / length, 1.0)
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(change)
                p.add_(state["momentum"], alpha=-group["lr"])


class PlainStep:
    """One update of a recipe.

    Attributes:
        online: modules `backbone`, `projector` and `predictors` (one MLP per slot), in train mode.
        target: `backbone` and `projector`, likewise; None where the online embeddings are the targets (SimSiam).
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        device: torch.device,
        total_steps: int,
        steps_per_epoch: int,
        step_mode: Literal["joint", "per-view"] = "joint",
    ) -> None:
        """Build networks and optimiser.

        Raises:
            InputError: an unknown method or backbone, or the recipe accumulates.
        """
        if recipe.accumulate != 1:
            raise invalid("Recipe.accumulate", recipe.accumulate, "1 for the plain step", "set it to 1")
        method = get_method(recipe.method)
        self.recipe = recipe
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self._device = device
        self._loss, self._target_rule = method.make_loss(recipe), method.target_rule
        self._tasks = task_pairs(recipe.views, recipe.task_weights)
        self._targets = target_views(recipe.views)
        self._slots = predictor_slots(recipe.views, recipe.predictors)
        self.online = _encoder(recipe, drop_path=True)
        self.target = _encoder(recipe, drop_path=False) if needs_target_network(recipe, method) else None
        views = online_views(recipe.views)
        first = self._targets if self.target is None else ()
        self._groups = [views] if step_mode == "joint" else _one_by_one(views, first=first)
        slots = len(tasks(recipe.views)) if recipe.predictors == "per-view" else 1
        if self.target is not None:
            self.target.load_state_dict(self.online.state_dict())
            self.target.requires_grad_(False).to(device).train()
        self._predictors = nn.ModuleList(MLP(recipe.projector.out, recipe.predictor) for _ in range(slots))
        self.online["predictors"] = self._predictors
        self.online.to(device).train()
        self.optimizer = _optimizer(self.online, recipe.optimizer)
        self._dtype = autocast_dtype(recipe.precision, device)
        self._scaler = GradScaler(device.type, enabled=self._dtype is torch.float16)

    def __call__(self, views: Sequence[Tensor], step: int) -> Tensor:
        """Train on one batch, V tensors [B, 3, S, S] on the device, as update number `step`; the loss, [] detached."""
        targets: dict[int, Tensor] = {}  # [B, out] by view
        if self.target is not None:
            self._move(self.target, step)
            with torch.no_grad(), self._autocast():
                targets = {t: _embed(self.target, views[t]) for t in self._targets}
        total = torch.zeros((), device=self._device)
        for group in self._groups:
            with self._autocast():
                embeddings = {v: _embed(self.online, views[v]) for v in group}  # [B, out] each
                if self.target is None:
                    targets |= {v: z.detach() for v, z in embeddings.items() if v in self._targets}
                predictions = {v: self._predictors[self._slots[v]](z) for v, z in embeddings.items()}
                loss = torch.zeros((), device=self._device)
                for task in self._tasks:
                    for v, t in task.pairs:
                        if v in predictions:
                            loss = loss + task.weight * self._loss(predictions[v], targets[t]) / len(task.pairs)
            torch.autograd.backward(self._scaler.scale(loss))
            total += loss.detach()
        self._update(step)
        return total

    def take_weights(self, network: OnlineNetwork) -> None:
        """Start from the weights of our network, for the target too."""
        for part in ("backbone", "projector"):
            self.online[part].load_state_dict(getattr(network, part).state_dict())
            if self.target is not None:
                self.target[part].load_state_dict(self.online[part].state_dict())
        for mine, theirs in zip(self._predictors, network.predictors.to_mlps().values(), strict=True):
            mine.load_state_dict(theirs.state_dict())

    @torch.no_grad()
    def _move(self, target: nn.ModuleDict, step: int) -> None:
        """Let the target follow: a moving average of the parameters, or (SimSiam) a copy."""
        average = self._target_rule == "ema"
        decay = ema_momentum(step, self.total_steps, self.recipe.target_decay) if average else 0.0
        for name, module in target.items():
            for follower, leader in zip(module.parameters(), self.online[name].parameters(), strict=True):
                follower.mul_(decay).add_(leader, alpha=1 - decay)
            if not average:
                for kept, own in zip(module.buffers(), self.online[name].buffers(), strict=True):
                    kept.copy_(own)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)

    def _update(self, step: int) -> None:
        config = self.recipe.optimizer
        apply_rates(
            self.optimizer,
            config,
            batch_size=self.recipe.batch_size,
            step=step,
            steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        if config.clip_grad_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.online.parameters(), config.clip_grad_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def _encoder(recipe: Recipe, *, drop_path: bool) -> nn.ModuleDict:
    """Backbone and projector."""
    backbone = build_backbone(recipe.backbone, drop_path=drop_path)
    width = feature_width(backbone, {view.size for view in recipe.views}, name=recipe.backbone.name)
    return nn.ModuleDict({"backbone": backbone, "projector": MLP(width, recipe.projector)})


def _embed(encoder: nn.ModuleDict, view: Tensor) -> Tensor:
    """[B, 3, S, S] -> [B, out]."""
    embedding: Tensor = encoder["projector"](encoder["backbone"](view))
    return embedding


def _one_by_one(views: tuple[int, ...], *, first: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Groups of views that go through together: each alone but for `first`, which the others meet."""
    return [group for group in (first, *((v,) for v in views if v not in first)) if group]


def _optimizer(online: nn.ModuleDict, config: Optimizer) -> torch.optim.Optimizer:
    """torch's optimiser, or LARS, with the groups that `apply_rates` knows."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}  # (vector, predictor)
    for name, parameter in online.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.dim() < 2, name.startswith("predictors.")), []).append(parameter)
    options: list[dict[str, Any]] = []
    for (vector, predictor), members in groups.items():
        decayed = config.kind == "sgd" or not vector
        decay = config.weight_decay if decayed else 0.0
        options.append(
            {"params": members, "vector": vector, "predictor": predictor, "decayed": decayed, "weight_decay": decay}
        )
    if config.kind == "lars":
        return PlainLARS(options, lr=config.base_lr, momentum=config.momentum, eta=config.eta)
    if config.kind == "sgd":
        return torch.optim.SGD(options, lr=config.base_lr, momentum=config.momentum)
    return torch.optim.AdamW(options, lr=config.base_lr, betas=config.betas)
