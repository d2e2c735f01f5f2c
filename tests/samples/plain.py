"""The three methods in their plainest form, after PAPER.md sections 2 to 5: what the training step is compared with.

Separate networks, one `nn.Sequential` per predictor, loops over views, pairs, images and parameters, every formula
written out. From mvssl come the numbers of a recipe only; the backbone is timm's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mvssl.config.recipe import Head, Recipe

Terms = Mapping[tuple[int, int], Tensor]
"""Loss of each pair by (online view, target view)."""


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the unit vectors, image by image; their mean."""
    distances = [(p / p.norm() - t / t.norm()).pow(2).sum() for p, t in zip(prediction, target, strict=True)]
    return torch.stack(distances).mean()


def simsiam_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Minus the cosine, image by image; their mean."""
    cosines = [(p * t).sum() / (p.norm() * t.norm()) for p, t in zip(prediction, target, strict=True)]
    return -torch.stack(cosines).mean()


def mocov3_loss(prediction: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Minus the log-probability of the own key among all, image by image; their mean times 2T."""
    terms = []
    for image, p in enumerate(prediction):
        scores = torch.stack([(p * key).sum() / (p.norm() * key.norm()) / temperature for key in keys])
        terms.append(torch.logsumexp(scores, 0) - scores[image])
    return 2 * temperature * torch.stack(terms).mean()


def mlp(width: int, head: Head) -> nn.Sequential:
    """The MLP of PAPER.md section 3."""
    layers: list[nn.Module] = []
    for size in head.hidden:
        layers += [nn.Linear(width, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
        width = size
    layers.append(nn.Linear(width, head.out))
    if head.output_norm:
        layers.append(nn.BatchNorm1d(head.out, affine=False))
    return nn.Sequential(*layers)


def backbone(name: str) -> nn.Module:
    """timm's model without classifier; a transformer takes any size of view."""
    options: dict[str, Any] = {"dynamic_img_size": True} if "vit" in name else {}
    return timm.create_model(name, num_classes=0, **options)


def gradient_of(p: Tensor) -> Tensor:
    """The gradient itself, not a copy."""
    assert p.grad is not None
    return p.grad


@dataclass(frozen=True, kw_only=True)
class PlainOutput:
    """What a plain step computed.

    Attributes:
        losses: each task's mean over its pairs, in the order of the tasks.
        total: the weighted total.
        norm: of all gradients together, before clipping.
        gradients: by parameter, after clipping.
        rates: learning rate and weight decay by parameter.
    """

    losses: Tensor
    total: Tensor
    norm: float
    gradients: dict[str, Tensor]
    rates: dict[str, tuple[float, float]]


class Plain:
    """A run in float64.

    Attributes:
        online: backbone, projector and predictors; trained.
        target: backbone and projector.
    """

    def __init__(
        self, recipe: Recipe, *, width: int, steps: int, steps_per_epoch: int, total: Callable[[Terms], Tensor]
    ) -> None:
        """Build networks, in any state: give them weights with `load_state_dict`.

        Args:
            recipe: for its views, sizes and rates; how its losses are weighted is given by `total`.
            width: features of the backbone.
            steps: updates in the run.
            steps_per_epoch: updates in an epoch.
            total: the whole loss from the losses of all pairs.
        """
        self.recipe, self.steps, self.steps_per_epoch, self.total = recipe, steps, steps_per_epoch, total
        self.tasks: list[str] = []
        for spec in recipe.views:
            if spec.task is not None and spec.task not in self.tasks:
                self.tasks.append(spec.task)
        slots = len(self.tasks) if recipe.predictors == "per-view" else 1
        self.online, self.target = (
            nn.ModuleDict({"backbone": backbone(recipe.backbone.name), "projector": mlp(width, recipe.projector)})
            for _ in range(2)
        )
        self.predictors = nn.ModuleList(mlp(recipe.projector.out, recipe.predictor) for _ in range(slots))
        self.online["predictors"] = self.predictors
        self.online.double().train()
        self.target.double().train()
        self.state: dict[str, dict[str, Tensor]] = {}
        self.updates = 0

    def step(self, views: list[Tensor], k: int) -> PlainOutput:
        """Move the target, compute losses and gradients, update: step k of the run."""
        self.move_target(k)
        terms = self.pair_losses(views)
        losses: list[Tensor] = []
        for task in self.tasks:
            members = [loss for (v, _), loss in terms.items() if self.recipe.views[v].task == task]
            losses.append(torch.stack(members).mean())
        total = self.total(terms)
        self.online.zero_grad()
        total.backward()
        gradients = {name: gradient_of(p) for name, p in self.online.named_parameters()}
        norm = math.sqrt(sum(gradient.pow(2).sum().item() for gradient in gradients.values()))
        clip = self.recipe.optimizer.clip_grad_norm
        for gradient in gradients.values():
            gradient *= 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        output = PlainOutput(
            losses=torch.stack(losses).detach(),
            total=total.detach(),
            norm=norm,
            gradients={name: gradient.clone() for name, gradient in gradients.items()},
            rates={name: self.rates(name, p, k) for name, p in self.online.named_parameters()},
        )
        self.updates += 1
        for name, p in self.online.named_parameters():
            self.update(name, p, *output.rates[name])
        return output

    def move_target(self, k: int) -> None:
        """A moving average of the parameters; for SimSiam a copy of everything, as in the paper's release."""
        if self.recipe.method == "simsiam":
            online = self.online.state_dict()
            self.target.load_state_dict({name: online[name].clone() for name in self.target.state_dict()})
            return
        decay = 1 - (1 - self.recipe.target_decay) * (1 + math.cos(math.pi * k / self.steps)) / 2
        online = dict(self.online.named_parameters())
        for name, p in self.target.named_parameters():
            p.data = decay * p.data + (1 - decay) * online[name].data

    def pair_losses(self, views: list[Tensor]) -> dict[tuple[int, int], Tensor]:
        """Every view with a task meets every target of another view; each view passes in a forward of its own.

        The online network sees targets before the others, which orders its running statistics and nothing else.
        """
        specs = self.recipe.views
        targets, predictions = {}, {}
        for v, spec in enumerate(specs):
            if spec.is_target:
                with torch.no_grad():
                    targets[v] = self.target["projector"](self.target["backbone"](views[v]))
        first = [v for v, spec in enumerate(specs) if spec.is_target]
        for v in first + [v for v in range(len(specs)) if v not in first]:
            task = specs[v].task
            if task is not None:
                slot = self.tasks.index(task) if self.recipe.predictors == "per-view" else 0
                embedding = self.online["projector"](self.online["backbone"](views[v]))
                predictions[v] = self.predictors[slot](embedding)
        return {
            (v, t): self.pair_loss(prediction, target)
            for v, prediction in predictions.items()
            for t, target in targets.items()
            if v != t
        }

    def pair_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of one pair."""
        if self.recipe.method == "mocov3":
            assert self.recipe.temperature is not None
            return mocov3_loss(prediction, target, self.recipe.temperature)
        return {"byol": byol_loss, "simsiam": simsiam_loss}[self.recipe.method](prediction, target)

    def rates(self, name: str, p: Tensor, k: int) -> tuple[float, float]:
        """Learning rate and weight decay of a parameter at step k."""
        config = self.recipe.optimizer
        if config.lr_schedule == "epoch":
            k = k // self.steps_per_epoch * self.steps_per_epoch
        base = config.base_lr if config.bias_lr is None or p.dim() > 1 else config.bias_lr
        warmup = config.warmup_epochs * self.steps_per_epoch
        if config.constant_predictor_lr and name.startswith("predictors."):
            base, factor = config.base_lr, 1.0
        elif k < warmup:
            factor = k / warmup
        else:
            q = (1 + math.cos(math.pi * (k - warmup) / (self.steps - warmup))) / 2
            factor = q + config.final_lr_factor * (1 - q)
        decay = config.weight_decay
        if config.weight_decay_end is not None:
            share = (1 - math.cos(math.pi * k / self.steps)) / 2  # how far from the first value to the last
            decay = (1 - share) * decay + share * config.weight_decay_end
        if p.dim() == 1 and config.kind != "sgd":
            decay = 0.0
        return base * self.recipe.batch_size / 256 * factor, decay

    def update(self, name: str, p: Tensor, lr: float, decay: float) -> None:
        """LARS, SGD or AdamW for one parameter."""
        config = self.recipe.optimizer
        zeros = {key: torch.zeros_like(p) for key in ("momentum", "square")}
        state = self.state.setdefault(name, zeros)
        old, gradient = p.detach().clone(), gradient_of(p)
        if config.kind == "adamw":
            first, second = config.betas
            state["momentum"] = first * state["momentum"] + (1 - first) * gradient
            state["square"] = second * state["square"] + (1 - second) * gradient**2
            mean = state["momentum"] / (1 - first**self.updates)
            deviation = (state["square"] / (1 - second**self.updates)).sqrt() + 1e-8
            p.data = old - lr * decay * old - lr * mean / deviation
            return
        change = gradient + decay * old
        if config.kind == "lars" and p.dim() > 1:
            size, length = old.norm().item(), change.norm().item()
            if size > 0 and length > 0:
                change = config.eta * size / length * change
        state["momentum"] = config.momentum * state["momentum"] + change
        p.data = old - lr * state["momentum"]
