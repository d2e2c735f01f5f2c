"""The training step: all views in, one optimiser update out, and nothing that waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvssl.backbones import is_convolutional
from mvssl.compiling import Encoders, wants_compile
from mvssl.methods import get_method
from mvssl.network import OnlineNetwork
from mvssl.optim import build_optimizer, learning_rate, target_decay
from mvssl.pairs import online_views, predictor_slots, target_views, task_pairs
from mvssl.precision import autocast_dtype, check_bf16_on_cpu
from mvssl.recipe import Recipe
from mvssl.target import TargetNetwork, ema_update, paired_parameters
from pipelines.errors import InputError

_ONLINE, _TARGET = 0, 1  # positions in `Encoders`


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step reports. Tensors stay on the device; reading one waits for it.

    Attributes:
        losses: float32 [T], each task's mean over its pairs, unweighted.
        loss: float32 [], the weighted total.
        embedding: [B, out], the online projector's output for the first online view, detached.
        grad_norm: float32 [], norm of the whole gradient before clipping.
        lr: learning rate of this update.
        decay: decay of the target network at this step.
    """

    losses: Tensor
    loss: Tensor
    embedding: Tensor
    grad_norm: Tensor
    lr: float
    decay: float


def build_networks(recipe: Recipe) -> tuple[OnlineNetwork, TargetNetwork]:
    """The online network and its target, equal at first; float32, on the CPU, in train mode.

    The encoder's initial weights are a function of `recipe.seed` and of the shapes of backbone and projector alone;
    torch's global generator is left as it was.

    Raises:
        InputError: the backbone is unknown or does not fit the view sizes.
    """
    # Only the CPU's generator: torch.manual_seed would also reseed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        online = OnlineNetwork(recipe)
        target = TargetNetwork(recipe)
    target.copy_from(online)
    return online, target


def initial_backbone(recipe: Recipe) -> nn.Module:
    """The backbone with the weights that a run of this recipe begins with, on the CPU, in train mode.

    Raises:
        InputError: the backbone is unknown or does not fit the view sizes.
    """
    return build_networks(recipe)[0].backbone


class TrainStep:
    """One optimiser update of a recipe (SPEC sections 3 to 5).

    Attributes:
        online, target: the networks, on the device, in train mode.
        optimizer: updates the online network.
        scaler: of fp16; does nothing in other precisions.
        autocast_dtype: the forward's dtype under autocast; None is plain float32.
        input_dtype: dtype that views are best given in.
    """

    def __init__(self, recipe: Recipe, *, device: torch.device | str, total_steps: int, steps_per_epoch: int) -> None:
        """Build networks (from `recipe.seed`), optimiser and scaler.

        Args:
            recipe: what decides the numbers.
            device: where the step runs.
            total_steps: updates in the whole run.
            steps_per_epoch: updates in an epoch.

        Raises:
            InputError: unknown method or backbone, view sizes that do not fit it, or a precision the device lacks.
        """
        self.recipe = recipe
        self.device = torch.device(device)
        self.total_steps = total_steps
        self.autocast_dtype = autocast_dtype(recipe.precision, self.device)
        self.input_dtype = self.autocast_dtype or torch.float32
        self._warmup = recipe.optimizer.warmup_epochs * steps_per_epoch
        self._method = get_method(recipe.method)
        self._tasks = task_pairs(recipe.views, recipe.task_weights)
        self._online_views = online_views(recipe.views)
        self._target_views = target_views(recipe.views)
        self._slots = predictor_slots(recipe.views, recipe.predictors)

        online, target = build_networks(recipe)
        if self.device.type == "cpu" and self.autocast_dtype is torch.bfloat16:
            check_bf16_on_cpu(online.backbone, (view.size for view in recipe.views))
        channels_last = recipe.channels_last and is_convolutional(online.backbone)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.online = online.to(self.device).to(memory_format=self._memory_format)
        self.target = target.to(self.device).to(memory_format=self._memory_format)
        self._parameters = list(self.online.parameters())
        self._averaged = paired_parameters(self.target, self.online)
        self._encoders = Encoders([self.online, self.target], compiled=wants_compile(recipe.compile, self.device))
        self.optimizer = build_optimizer(self.online, recipe.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype is torch.float16)

    def __call__(self, views: Sequence[Tensor], step: int) -> StepOutput:
        """Train on one batch.

        Args:
            views: one [B, 3, S, S] tensor per view of the recipe, on the device, in `input_dtype` or float32.
            step: number of this update in the run, from 0.
        """
        if len(views) != len(self.recipe.views):
            raise InputError(
                f"views has {len(views)} tensors but must have {len(self.recipe.views)}, one for each view of the "
                "recipe: make them with ViewEngine(recipe.views)."
            )
        config = self.recipe.optimizer
        lr = learning_rate(step, self.total_steps, self._warmup, self.recipe.learning_rate, config.final_lr_factor)
        decay = target_decay(step, self.total_steps, self.recipe.target_decay)
        ema_update(*self._averaged, decay)
        views = [view.contiguous(memory_format=self._memory_format) for view in views]
        gradients = self._joint if self.recipe.step_mode == "joint" else self._per_view
        losses, embedding = self._encoders.run(lambda: gradients(views))
        grad_norm = self._update(lr)
        return StepOutput(
            losses=losses,
            loss=self._total(losses),
            embedding=embedding,
            grad_norm=grad_norm,
            lr=lr,
            decay=decay,
        )

    def _autocast(self) -> torch.autocast:
        """Autocast for a forward; a no-op in float32."""
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def _total(self, losses: Tensor) -> Tensor:
        """The weighted sum of the losses [T]."""
        return torch.stack([task.weight * term for task, term in zip(self._tasks, losses, strict=True)]).sum()

    @torch.no_grad()
    def _targets(self, views: Sequence[Tensor]) -> dict[int, Tensor]:
        """Embeddings [B, out] of the target views by their position."""
        with self._autocast():
            return {t: self._encoders(_TARGET, views[t]) for t in self._target_views}

    def _joint(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Add up the gradients with all views in one graph; the losses [T] and the first embedding [B, out]."""
        targets = self._targets(views)
        with self._autocast():
            z = torch.stack([self._encoders(_ONLINE, views[v]) for v in self._online_views])  # [V, B, out]
            predictions = self.online.predictors(z, self._slots).unbind(0)
            by_view = dict(zip(self._online_views, predictions, strict=True))
            losses = torch.stack(
                [
                    torch.stack([self._method.pair_loss(by_view[v], targets[t]) for v, t in task.pairs]).mean()
                    for task in self._tasks
                ]
            )  # [T]
        torch.autograd.backward(self.scaler.scale(self._total(losses)))
        return losses.detach(), z[0].detach()

    def _per_view(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `_joint`, but with the graph of one view at a time in memory."""
        targets = self._targets(views)
        losses: dict[str, Tensor] = {}
        embeddings: list[Tensor] = []
        for v, slot in zip(self._online_views, self._slots, strict=True):
            task = next(task for task in self._tasks if task.task == self.recipe.views[v].task)
            with self._autocast():
                z = self._encoders(_ONLINE, views[v])  # [B, out]
                prediction = self.online.predictors(z.unsqueeze(0), (slot,))[0]  # [B, out]
                terms = [self._method.pair_loss(prediction, targets[t]) for view, t in task.pairs if view == v]
                part = torch.stack(terms).sum() / len(task.pairs)
            torch.autograd.backward(self.scaler.scale(task.weight * part))
            losses[task.task] = losses[task.task] + part.detach() if task.task in losses else part.detach()
            embeddings = embeddings or [z.detach()]
        return torch.stack([losses[task.task] for task in self._tasks]), embeddings[0]

    def _update(self, lr: float) -> Tensor:
        """Update the online network by its gradients and clear them; the gradient's norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.recipe.optimizer.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.recipe.optimizer.clip_grad_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from but torch's random state; tensors are not copied."""
        return {
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the values are copied.

        Raises:
            RuntimeError: names or shapes are those of other networks.
        """
        self.online.load_state_dict(state["online"])
        self.target.load_state_dict(state["target"])
        # torch's optimisers keep the tensors they are given.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.scaler.load_state_dict(state["scaler"])
