"""The training step: all views in, one optimiser update out, and nothing that waits for the device.

The objective of a step: views in, gradients and losses out (SPEC sections 3 and 4).

One pass of some views through the online network, from images to the loss: what is compiled, and what DDP wraps.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from mvssl.config.options import autocast_dtype, check_bf16_on_cpu
from mvssl.config.recipe import Recipe
from mvssl.distributed import World
from mvssl.methods import Method, get_method
from mvssl.models.backbones import is_convolutional, to_memory_format
from mvssl.models.batchnorm import SyncBatchNorm
from mvssl.models.encoder import Follow, OnlineNetwork, TargetNetwork, build_networks
from mvssl.models.view_batching import Group, Plan, make_plan, predictor_slots, stack_views, target_views, task_pairs
from mvssl.optim import apply_rates, build_optimizer, hold_on_device, target_decay
from mvssl.training.compile import Compiler, wants_compile
from mvssl.training.cuda_graph import WARM_UP, WARM_UP_RANKS, CudaGraph, StepGraph, in_stream, wants_capture
from pipelines.runtime import InputError, invalid


class OnlinePass(nn.Module):
    """Embeddings, predictions and losses of one group of a plan."""

    def __init__(
        self, online: OnlineNetwork, recipe: Recipe, method: Method, plan: Plan, *, compiler: Compiler
    ) -> None:
        super().__init__()
        self.online = online
        self._groups = plan.online
        self._loss = method.make_loss(recipe)
        self._tasks = task_pairs(recipe.views, recipe.task_weights)
        self._targets = target_views(recipe.views)
        self._slots = predictor_slots(recipe.views, recipe.predictors)
        # View by view, groups differ in their losses: only what they share is compiled, and once for each size.
        joint = len(plan.online) == 1
        self._compute = compiler(self._all) if joint else self._all
        self._encode = self.online.embed if joint else compiler(self.online.embed)

    def forward(self, number: int, batches: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Pass the views of a group.

        Args:
            number: of the group.
            batches: [V * B, 3, S, S] for each of its blocks.
            targets: what predictions meet, [N, out] for each target view; empty where targets are the group's own
                embeddings without gradient.

        Returns:
            z [V, B, out], embeddings in the order of the group's views; losses [T], what these views add to the mean of
            each task over its pairs, detached; total [], the same weighted and summed, with gradient.
        """
        result: tuple[Tensor, Tensor, Tensor] = self._compute(number, batches, targets)
        return result

    def _all(self, number: int, batches: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        group = self._groups[number]
        z = self._encode(batches, group)  # [V, B, out]
        predictions = self.online.predictors(z, tuple(self._slots[v] for v in group.views))  # [V, B, out]
        losses = self._losses(group, predictions, targets or [z[group.views.index(t)].detach() for t in self._targets])
        total = torch.stack([task.weight * loss for task, loss in zip(self._tasks, losses, strict=True)]).sum()
        return z, torch.stack(losses).detach(), total

    def _losses(self, group: Group, predictions: Tensor, targets: list[Tensor]) -> list[Tensor]:
        """What the views of a group add to each task's mean over its pairs; 0 where none of them is of the task."""
        places = {v: place for place, v in enumerate(group.views)}
        met = dict(zip(self._targets, targets, strict=True))
        zero = predictions.new_zeros((), dtype=torch.promote_types(predictions.dtype, torch.float32))
        losses = []
        for task in self._tasks:
            terms = [self._loss(predictions[places[v]], met[t]) for v, t in task.pairs if v in places]
            losses.append(torch.stack(terms).sum() / len(task.pairs) if terms else zero)
        return losses


Part = TypeVar("Part")


class Outcome(NamedTuple):
    """What the objective of a batch is.

    Attributes:
        losses: float32 [T], each task's mean over its pairs, unweighted.
        loss: float32 [], the weighted total.
        embedding: [B, out], of the first online view.
    """

    losses: Tensor
    loss: Tensor
    embedding: Tensor


def needs_target_network(recipe: Recipe, method: Method) -> bool:
    """Whether targets take a network and a forward of their own.

    Where the target is the online network itself (SimSiam), the online embeddings without gradient are the targets, but
    for views that the online network does not embed, and for stochastic depth, which the target has not.
    """
    target_only = any(spec.is_target and spec.task is None for spec in recipe.views)
    return method.target_rule != "same" or target_only or recipe.backbone.drop_path > 0


class Objective:
    """Adds the gradients of one batch to the online network's parameters.

    One graph of all views (step_mode joint) or view by view (per-view) with the same numbers. A batch in `accumulate`
    parts gives the numbers of as many ranks with a part each, running statistics those of the first one. On several
    ranks the gradients are averaged over them during the last backward.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        online: OnlineNetwork,
        target: TargetNetwork | None,
        plan: Plan,
        *,
        world: World,
        compiled: bool,
        autocast: torch.dtype | None,
        scaler: GradScaler,
    ) -> None:
        """Wrap networks that are on their device; `target` is None where `needs_target_network` says so.

        Raises:
            InputError: the method's targets are online embeddings that meet those of all images, in several parts.
        """
        self._recipe = recipe
        self._plan = plan
        self._gathers = method.keys == "all"
        self._world = world
        self._autocast_dtype = autocast
        self._scaler = scaler
        self._device_type = next(online.parameters()).device.type
        self._target = target
        self._targets = target_views(recipe.views)
        weights = [task.weight for task in task_pairs(recipe.views, recipe.task_weights)]
        self._weights = torch.tensor(weights, device=next(online.parameters()).device)  # [T]
        modules = [online] if target is None else [online, target]
        self._online = online
        self._compiler = Compiler(modules, enabled=compiled, ranks=world.size)
        self._embed = None if target is None else self._compiler(target.embed)
        one_pass = OnlinePass(online, recipe, method, plan, compiler=self._compiler)
        self._pass = one_pass if world.size == 1 else _data_parallel(one_pass)
        if target is None and self._gathers and world.size * recipe.accumulate > 1:
            raise InputError(
                f"Recipe.method is {recipe.method!r}, whose targets are online embeddings of all images of a step: it "
                "takes one process and accumulate 1, or a target network."
            )

    @property
    def compiled(self) -> bool:
        """Whether the passes run compiled (not after a failure to compile)."""
        return self._compiler.compiled

    def __call__(self, stacks: Sequence[Tensor]) -> Outcome:
        """Add up the gradients of a batch.

        Args:
            stacks: [parts, V * B / parts, 3, S, S] for each of the plan's stacks, on the device (`stack_views`).
        """
        return self._compiler.run(lambda: self._parts(stacks))

    def _parts(self, stacks: Sequence[Tensor]) -> Outcome:
        """The batch in `accumulate` parts one after the other; all targets first, since parts may meet all of them."""
        parts = [[stack[part] for stack in stacks] for part in range(self._recipe.accumulate)]
        targets = self._embed_targets(parts)
        outcomes = []
        with _first_part_counts(self._online, parts) as each:
            for number, part in each:
                last = number == len(parts) - 1
                outcomes.append(self._add(part, targets[number], share=1 / len(parts), last=last))
        if len(outcomes) == 1:
            return outcomes[0]
        return Outcome(
            losses=torch.stack([outcome.losses for outcome in outcomes]).mean(dim=0),
            loss=torch.stack([outcome.loss for outcome in outcomes]).mean(),
            embedding=torch.cat([outcome.embedding for outcome in outcomes]),
        )

    def _add(self, stacks: Sequence[Tensor], targets: list[Tensor], *, share: float, last: bool) -> Outcome:
        """Add `share` of the gradients of these images; average them over the ranks with the `last` backward."""
        losses: list[Tensor] = []
        embedding: Tensor | None = None
        for number, group in enumerate(self._plan.online):
            with self._gradients(averaged=last and number == len(self._plan.online) - 1):
                with self._autocast(), self._synchronised("online"):
                    batches = [self._plan.cut(stacks, block) for block in group.blocks]
                    z, added, total = self._pass(number, batches, targets)
                torch.autograd.backward(self._scaler.scale(share * total))
            losses.append(added)
            embedding = z[0].detach() if embedding is None else embedding
            targets = targets or [z[group.views.index(t)].detach() for t in self._targets]
        if embedding is None:
            raise AssertionError("check_views makes sure that a view has a task")
        summed = losses[0] if len(losses) == 1 else torch.stack(losses).sum(dim=0)  # [T]
        return Outcome(losses=summed, loss=(self._weights.to(summed.dtype) * summed).sum(), embedding=embedding)

    @torch.no_grad()
    def _embed_targets(self, parts: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """What predictions meet, for each part and target view: [B, out], or those of all parts and ranks.

        Empty lists where the online embeddings are the targets.
        """
        if self._embed is None or self._target is None:
            return [[] for _ in parts]
        embedded: list[Tensor] = []  # [targets, B, out] of each part
        blocks = self._plan.targets.blocks
        with self._autocast(), self._synchronised("target"), _first_part_counts(self._target, parts) as each:
            for _, stacks in each:
                embedded.append(self._embed([self._plan.cut(stacks, block) for block in blocks], self._plan.targets))
        if not self._gathers:
            return [list(z.unbind()) for z in embedded]
        images = embedded[0].shape[1]
        keys = [self._world.gather_own_first(torch.cat(view)) for view in zip(*embedded, strict=True)]
        # This rank's parts stand first; each meets its own keys first, then those behind it, in a ring.
        return [[all_keys.roll(-number * images, 0) for all_keys in keys] for number in range(len(parts))]

    def _autocast(self) -> torch.autocast:
        """Autocast for a forward; a no-op in float32."""
        return torch.autocast(self._device_type, self._autocast_dtype, enabled=self._autocast_dtype is not None)

    def _synchronised(self, network: str) -> AbstractContextManager[object]:
        """BatchNorm over all ranks for this network's forward, where the recipe asks for it."""
        asked = self._recipe.sync_batchnorm in (network, "both")
        return SyncBatchNorm(self._world.size) if asked and self._world.size > 1 else nullcontext()

    @contextmanager
    def _gradients(self, *, averaged: bool) -> Iterator[None]:
        """A forward and backward whose gradients are averaged over the ranks, or only added up on this one."""
        if averaged or not isinstance(self._pass, DistributedDataParallel):
            yield
        else:
            with self._pass.no_sync():
                yield


@contextmanager
def _first_part_counts(network: nn.Module, parts: Sequence[Part]) -> Iterator[Iterator[tuple[int, Part]]]:
    """Number the parts of a batch, and leave the network's buffers (running statistics) as the first one leaves them.

    They are those of rank 0 then, where each part is a rank's.
    """
    buffers = list(network.buffers()) if len(parts) > 1 else []
    kept: list[Tensor] = []

    def each() -> Iterator[tuple[int, Part]]:
        for number, part in enumerate(parts):
            if number == 1:
                kept.extend(buffer.clone() for buffer in buffers)
            yield number, part

    yield each()
    if kept:
        with torch.no_grad():
            torch._foreach_copy_(buffers, kept)


def _data_parallel(one_pass: OnlinePass) -> DistributedDataParallel:
    """Average the gradients over the ranks; buffers stay each rank's own, as its BatchNorm statistics are."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # in torch 2.14
    own_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(one_pass, gradient_as_bucket_view=True, **own_buffers)


def check_batch(recipe: Recipe, world: World) -> int:
    """Images per step of each rank.

    Raises:
        InputError: the batch does not divide among the ranks and parts, or leaves BatchNorm a single image.
    """
    pieces = world.size * recipe.accumulate
    if recipe.batch_size % pieces:
        raise invalid(
            "Recipe.batch_size",
            recipe.batch_size,
            f"a multiple of {world.size} ranks times {recipe.accumulate} parts (accumulate)",
            "give each rank and part as many images",
        )
    if recipe.batch_size // pieces < 2:
        raise invalid(
            "Recipe.batch_size",
            recipe.batch_size,
            f"at least {2 * pieces} on {world.size} ranks in {recipe.accumulate} parts (accumulate)",
            "raise it, or take fewer parts",
        )
    return recipe.batch_size // world.size


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
    same operations on the same memory: on CUDA they are recorded once and replayed (`mvssl.training.cuda_graph`).

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
