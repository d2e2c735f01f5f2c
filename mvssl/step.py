"""The training step: all views in, one optimiser update out, and nothing that waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvssl.backbones import is_convolutional
from mvssl.compiling import wants_compile
from mvssl.distributed import World
from mvssl.methods import get_method
from mvssl.objective import Objective, check_accumulation, check_batch, needs_target_network
from mvssl.optim import apply_rates, build_optimizer, target_decay
from mvssl.precision import autocast_dtype, check_bf16_on_cpu
from mvssl.recipe import Recipe
from mvssl.siamese import build_networks
from mvssl.target import Follow
from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step reports. Tensors stay on the device; reading one waits for it.

    Attributes:
        losses: float32 [T], each task's mean over its pairs, unweighted, of this rank's images.
        loss: float32 [], the weighted total.
        embedding: [B, out], the online projector's output for the first online view, detached.
        grad_norm: float32 [], norm of the whole gradient before clipping.
        lr: learning rate of this update.
        decay: decay of the target network at this step; 0 where the target is the online network itself.
    """

    losses: Tensor
    loss: Tensor
    embedding: Tensor
    grad_norm: Tensor
    lr: float
    decay: float


class TrainStep:
    """One optimiser update of a recipe (SPEC sections 3 to 5).

    Attributes:
        online: the network that is trained, on the device, in train mode.
        target: the target network likewise; None where the online embeddings are the targets (SimSiam).
        optimizer: updates the online network.
        scaler: of fp16; does nothing in other precisions.
        autocast_dtype: the forward's dtype under autocast; None is plain float32.
        input_dtype: dtype that views are best given in.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        device: torch.device | str,
        total_steps: int,
        steps_per_epoch: int,
        world: World | None = None,
    ) -> None:
        """Build networks (from `recipe.seed`), optimiser and scaler.

        Args:
            recipe: what decides the numbers.
            device: where the step runs.
            total_steps: updates in the whole run.
            steps_per_epoch: updates in an epoch.
            world: the ranks that train together, each on its share of the batch; None is this process alone.

        Raises:
            InputError: unknown method or backbone, settings that do not fit the method, view sizes that do not fit the
                backbone, a batch that does not divide, or a precision the device lacks.
        """
        self.recipe = recipe
        self.device = torch.device(device)
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.autocast_dtype = autocast_dtype(recipe.precision, self.device)
        self.input_dtype = self.autocast_dtype or torch.float32
        self._world = world or World()
        method = get_method(recipe.method)
        check_batch(recipe, self._world)

        online, target = build_networks(recipe)
        check_accumulation(recipe, method, online)
        if self.device.type == "cpu" and self.autocast_dtype is torch.bfloat16:
            check_bf16_on_cpu(online.backbone, (view.size for view in recipe.views))
        channels_last = recipe.channels_last and is_convolutional(online.backbone)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.online = online.to(self.device).to(memory_format=self._memory_format)
        self.target = None
        if needs_target_network(recipe, method):
            self.target = target.to(self.device).to(memory_format=self._memory_format)
        self._target_rule = method.target_rule
        self._follow = None if self.target is None else Follow(self.target, self.online)
        self._parameters = [parameter for parameter in self.online.parameters() if parameter.requires_grad]
        self._draws = _draws(self.online)
        self.optimizer = build_optimizer(self.online, recipe.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype is torch.float16)
        self._objective = Objective(
            recipe,
            method,
            self.online,
            self.target,
            world=self._world,
            compiled=wants_compile(recipe, self.device, ranks=self._world.size),
            autocast=self.autocast_dtype,
            scaler=self.scaler,
        )

    @property
    def compiled(self) -> bool:
        """Whether the encoders run compiled."""
        return self._objective.compiled

    def __call__(self, views: Sequence[Tensor], step: int) -> StepOutput:
        """Train on one batch.

        Args:
            views: one [B, 3, S, S] tensor per view of the recipe, on the device, in `input_dtype` or float32; B is this
                rank's share of the batch.
            step: number of this update in the run, from 0.
        """
        if len(views) != len(self.recipe.views):
            raise InputError(
                f"views has {len(views)} tensors but must have {len(self.recipe.views)}, one for each view of the "
                "recipe: make them with ViewEngine(recipe.views)."
            )
        if self._draws:
            self._seed(step)
        decay = self._move_target(step)
        losses, embedding = self._objective([view.contiguous(memory_format=self._memory_format) for view in views])
        lr = apply_rates(
            self.optimizer,
            self.recipe.optimizer,
            batch_size=self.recipe.batch_size,
            step=step,
            steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        return StepOutput(
            losses=losses,
            loss=self._objective.total(losses),
            embedding=embedding,
            grad_norm=self._update(),
            lr=lr,
            decay=decay,
        )

    def _seed(self, step: int) -> None:
        """Seed what layers draw (stochastic depth) by (seed, step, rank), so that a resumed run draws the same."""
        words = np.random.SeedSequence([self.recipe.seed, step, self._world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> np.uint64(1)))

    def _move_target(self, step: int) -> float:
        """Let the target network follow before the forward; the decay it did so with."""
        if self._target_rule == "ema":
            decay = target_decay(step, self.total_steps, self.recipe.target_decay)
            if self._follow is not None:
                self._follow.average(decay)
            return decay
        if self._follow is not None:
            self._follow.copy()
        return 0.0

    def _update(self) -> Tensor:
        """Update the online network by its gradients and clear them; the gradient's norm before clipping."""
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
        """Everything that training goes on from; tensors are not copied."""
        return {
            "online": self.online.state_dict(),
            "target": None if self.target is None else self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the values are copied.

        Raises:
            RuntimeError: names or shapes are those of other networks.
        """
        self.online.load_state_dict(state["online"])
        if self.target is not None:
            self.target.load_state_dict(state["target"])
        # torch's optimisers keep the tensors they are given.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.scaler.load_state_dict(state["scaler"])


def _draws(network: nn.Module) -> bool:
    """Whether layers of a network draw random numbers in training (stochastic depth, dropout)."""
    rates = ("drop_prob", "p")  # timm's DropPath, torch's Dropout
    return any(
        isinstance(getattr(module, name, None), float) and getattr(module, name) > 0
        for module in network.modules()
        for name in rates
    )
