"""The training step: all views in, one optimiser update out, and nothing that waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from mvssl.distributed import World
from mvssl.methods import get_method
from mvssl.networks.backbones import is_convolutional, to_memory_format
from mvssl.networks.passes import make_plan, stack_views
from mvssl.networks.siamese import build_networks
from mvssl.networks.target import Follow
from mvssl.optim import apply_rates, build_optimizer, hold_on_device, target_decay
from mvssl.recipe import Recipe
from mvssl.training.compiled.capture import WARM_UP, WARM_UP_RANKS, CudaGraph, StepGraph, in_stream, wants_capture
from mvssl.training.compiled.compiling import wants_compile
from mvssl.training.objective import Objective, check_batch, needs_target_network
from mvssl.training.precision import autocast_dtype, check_bf16_on_cpu
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

    What differs from step to step (views, learning rates, decays) lies in tensors on the device, so every step is the
    same operations on the same memory: on CUDA they are recorded once and replayed (`mvssl.training.compiled.capture`).

    Attributes:
        online: the network that is trained, on the device, in train mode.
        target: the target network likewise; None where the online embeddings are the targets (SimSiam).
        optimizer: updates the online network.
        scaler: of fp16; does nothing in other precisions.
        autocast_dtype: the forward's dtype under autocast; None is plain float32.
        input_dtype: dtype that views are best given in.
        view_by_view: why views of one size do not pass as one batch though all share a graph; None if they do.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        device: torch.device | str,
        total_steps: int,
        steps_per_epoch: int,
        world: World | None = None,
        cuda_graph: Literal["auto", "on", "off"] = "auto",
        group_views: bool = True,
    ) -> None:
        """Build networks (from `recipe.seed`), optimiser and scaler.

        Args:
            recipe: what decides the numbers.
            device: where the step runs.
            total_steps: updates in the whole run.
            steps_per_epoch: updates in an epoch.
            world: the ranks that train together, each on its share of the batch; None is this process alone.
            cuda_graph: whether a step is one replay of a CUDA graph; auto: on CUDA, in a run of one process.
            group_views: whether views of one size pass as one batch where the network allows it; off to compare.

        Raises:
            InputError: unknown method or backbone, settings that do not fit the method, view sizes that do not fit the
                backbone, a batch that does not divide, a precision the device lacks, or a graph that cannot be.
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
        captures = wants_capture(cuda_graph, self.device, ranks=self._world.size)

        online, target = build_networks(recipe)
        if self.device.type == "cpu" and self.autocast_dtype is torch.bfloat16:
            check_bf16_on_cpu(online.backbone, (view.size for view in recipe.views))
        channels_last = recipe.channels_last and is_convolutional(online.backbone)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.online = to_memory_format(online.to(self.device), self._memory_format)
        self.target = None
        if needs_target_network(recipe, method):
            self.target = to_memory_format(target.to(self.device), self._memory_format)
        self.view_by_view = online.ungroupable
        self._target_rule = method.target_rule
        self._follow = None if self.target is None else Follow(self.target, self.online)
        self._parameters = [parameter for parameter in self.online.parameters() if parameter.requires_grad]
        self._draws = _draws(self.online)
        self.optimizer = build_optimizer(self.online, recipe.optimizer)
        hold_on_device(self.optimizer, recipe.optimizer)
        dtype = torch.promote_types(self._parameters[0].dtype, torch.float32)
        self._pace = torch.zeros((), dtype=dtype, device=self.device)  # 1 - decay of the target network
        self.scaler = GradScaler(self.device.type, enabled=self.autocast_dtype is torch.float16)
        self._plan = make_plan(
            recipe.views,
            joint=recipe.step_mode == "joint",
            grouped=group_views and self.view_by_view is None,
            targets_first=self.target is None,
        )
        # Warm-up, recording and replays share one stream of the step's device; DistributedDataParallel is made in it.
        stream: Any = torch.cuda.Stream(self.device) if captures else None  # type: ignore[no-untyped-call]  # torch's
        with in_stream(stream):
            self._objective = Objective(
                recipe,
                method,
                self.online,
                self.target,
                self._plan,
                world=self._world,
                compiled=wants_compile(recipe, self.device, ranks=self._world.size),
                autocast=self.autocast_dtype,
                scaler=self.scaler,
            )
        self._graph = StepGraph(
            self._device_step,
            self._forget,
            wanted=captures,
            asked=cuda_graph == "on",
            warm_up=WARM_UP if self._world.size == 1 else WARM_UP_RANKS,
            stream=stream,
            graph=lambda: CudaGraph(stream),
        )

    @property
    def compiled(self) -> bool:
        """Whether the passes run compiled."""
        return self._objective.compiled

    @property
    def captured(self) -> bool:
        """Whether steps are replays of a CUDA graph by now."""
        return self._graph.captured

    @property
    def description(self) -> str:
        """In words, how steps are run by now."""
        how = ["compiled" if self.compiled else "not compiled"]
        if self.recipe.step_mode == "per-view":
            how.append("one graph a view")
        else:
            how.append("views of one size together" if self.view_by_view is None else "views one by one")
        if self.device.type == "cuda":
            how.append("one CUDA graph" if self.captured else "launched kernel by kernel")
        return ", ".join(how)

    @property
    def warm_up(self) -> int:
        """How many steps compile or record something; later ones are all alike."""
        return self._graph.warm_up

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being recorded at this moment, when other threads should leave the device's queue."""
        return self._graph.capturing

    def __call__(self, views: Sequence[Tensor], step: int) -> StepOutput:
        """Train on one batch.

        Args:
            views: one [B, 3, S, S] tensor per view of the recipe, on the device, in `input_dtype` or float32; B is this
                rank's share of the batch.
            step: number of this update in the run, from 0.

        Raises:
            InputError: the number, shapes or dtypes of the views are not those of the recipe, or of earlier steps.
        """
        self._check(views)
        if self._draws:
            self._seed(step)
        lr, decay = self._set_numbers(step)
        stacks = stack_views(
            self._plan,
            views,
            parts=self.recipe.accumulate,
            memory_format=self._memory_format,
            out=self._graph.inputs,
        )
        losses, loss, embedding, grad_norm = self._graph(stacks)
        return StepOutput(losses=losses, loss=loss, embedding=embedding, grad_norm=grad_norm, lr=lr, decay=decay)

    def _check(self, views: Sequence[Tensor]) -> None:
        """Check the shapes of a batch, which must be those of every batch.

        Raises:
            InputError: they are not.
        """
        specs = self.recipe.views
        if len(views) != len(specs):
            raise InputError(
                f"views has {len(views)} tensors but must have {len(specs)}, one for each view of the "
                "recipe: make them with ViewEngine(recipe.views)."
            )
        images = self.recipe.batch_size // self._world.size
        for view, spec in zip(views, specs, strict=True):
            wanted = (images, 3, spec.size, spec.size)
            if tuple(view.shape) != wanted or view.dtype != views[0].dtype:
                raise InputError(
                    f"views[{spec.name!r}] is {list(view.shape)} of {view.dtype} but must be {list(wanted)} of "
                    f"{views[0].dtype}: all batches of a run have one shape; drop the last short one of an epoch "
                    "(pipelines.Order does)."
                )

    def _seed(self, step: int) -> None:
        """Seed what layers draw (stochastic depth) by (seed, step, rank), so that a resumed run draws the same."""
        words = np.random.SeedSequence([self.recipe.seed, step, self._world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> np.uint64(1)))

    def _set_numbers(self, step: int) -> tuple[float, float]:
        """Put the numbers of a step where its operations read them; the learning rate and the target's decay."""
        lr = apply_rates(
            self.optimizer,
            self.recipe.optimizer,
            batch_size=self.recipe.batch_size,
            step=step,
            steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        if self._target_rule != "ema":
            return lr, 0.0
        decay = target_decay(step, self.total_steps, self.recipe.target_decay)
        self._pace.fill_(1.0 - decay)
        return lr, decay

    def _device_step(self, stacks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All that the device does in a step; losses [T], loss [], embedding [B, out] and gradient norm []."""
        if self._follow is not None and self._target_rule == "ema":
            self._follow.average(self._pace)
        elif self._follow is not None:
            self._follow.copy()
        losses, loss, embedding = self._objective(stacks)
        return losses, loss, embedding, self._update()

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

    def _forget(self) -> None:
        """Drop what a recording that failed left behind in Python; nothing of it ran on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        # A scaler that has unscaled waits for its update, which never ran.
        self.scaler._per_optimizer_states.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from; tensors are not copied. Waits for the device."""
        optimizer = self.optimizer.state_dict()
        groups = [
            {name: float(value) if isinstance(value, Tensor) else value for name, value in group.items()}
            for group in optimizer["param_groups"]
        ]
        return {
            "online": self.online.state_dict(),
            "target": None if self.target is None else self.target.state_dict(),
            "optimizer": optimizer | {"param_groups": groups},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the values are copied.

        Raises:
            RuntimeError: names or shapes are those of other networks.
        """
        self._graph.drop()  # which replays on the tensors of before
        self.online.load_state_dict(state["online"])
        if self.target is not None:
            self.target.load_state_dict(state["target"])
        # torch's optimisers keep the tensors they are given.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        hold_on_device(self.optimizer, self.recipe.optimizer)
        self.scaler.load_state_dict(state["scaler"])


def _draws(network: nn.Module) -> bool:
    """Whether layers of a network draw random numbers in training (stochastic depth, dropout)."""
    rates = ("drop_prob", "p")  # timm's DropPath, torch's Dropout
    return any(
        isinstance(getattr(module, name, None), float) and getattr(module, name) > 0
        for module in network.modules()
        for name in rates
    )
