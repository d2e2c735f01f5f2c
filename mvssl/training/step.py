"""The training step: all views of a batch in, one optimiser update out, without waiting for the device."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from mvssl.config.device import autocast_dtype, check_bf16_on_cpu
from mvssl.config.options import Execution
from mvssl.config.recipe import Recipe
from mvssl.distributed import World
from mvssl.methods import Method, get_method
from mvssl.models.backbones import is_convolutional, to_memory_format
from mvssl.models.batchnorm import SyncBatchNorm
from mvssl.models.checkpointing import checkpoint_blocks
from mvssl.models.encoder import OnlineNetwork, TargetUpdate, build_networks
from mvssl.models.view_batching import (
    BatchingPlan,
    ViewGroup,
    make_plan,
    predictor_slots,
    stack_views,
    target_views,
    task_pairs,
)
from mvssl.optim import apply_rates, build_optimizer, ema_momentum, rates_to_device
from mvssl.optim.state import check_optimizer_state, check_scaler_state
from mvssl.training.compile import Compiler, wants_compile
from mvssl.training.cuda_graph import WARM_UP, WARM_UP_RANKS, CudaGraph, StepGraph, in_stream, wants_capture
from pipelines.runtime import InputError, invalid

MicroBatch = TypeVar("MicroBatch")


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """Results of a step. Tensors stay on the device; reading one waits for it.

    Attributes:
        losses: float32 [T], mean loss of each task over its pairs, unweighted, of this rank's images.
        loss: float32 [], weighted total.
        embedding: [B, out], projector output for the first online view, detached.
        grad_norm: float32 [], norm of the whole gradient before clipping.
        lr: learning rate of this update.
        tau: EMA momentum of the target network at this step; 0 for other target rules.
    """

    losses: Tensor
    loss: Tensor
    embedding: Tensor
    grad_norm: Tensor
    lr: float
    tau: float


class TrainStep:
    """One optimiser update of a recipe (PAPER.md sections 3 to 5).

    What changes from step to step (views, learning rates, EMA momentum) lies in device tensors, so every step
    is the same operations on the same memory, and on CUDA one replayed graph.

    Attributes:
        online: the trained network, on the device, in train mode.
        target: the target network; None if the online embeddings are the targets (SimSiam).
        optimizer: updates the online network.
        scaler: loss scaling for fp16; a no-op in other precisions.
        autocast_dtype: dtype of the forward under autocast; None for plain float32.
        input_dtype: preferred dtype of the views.
        view_by_view: the layer that forces sequential views in a batched step; None if views are batched.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        execution: Execution | None = None,
        device: torch.device | str,
        total_steps: int,
        steps_per_epoch: int,
        world: World | None = None,
        group_views: bool = True,
    ) -> None:
        """Build networks (initialised from `recipe.seed`), optimiser and scaler.

        Args:
            recipe: the settings that determine the numbers.
            execution: the settings that do not; None for the defaults.
            device: where the step runs.
            total_steps: updates in the whole run.
            steps_per_epoch: updates in an epoch.
            world: the ranks that train together, each on its part of the batch; None for this process alone.
            group_views: whether views of one size form one batch where the network allows it; off for comparisons.

        Raises:
            InputError: the recipe does not fit the method, the backbone, the ranks or the device.
        """
        self.recipe = recipe
        self.execution = execution = execution or Execution()
        self.device = torch.device(device)
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.autocast_dtype = autocast_dtype(recipe.precision, self.device)
        self.input_dtype = self.autocast_dtype or torch.float32
        self._world = world or World()
        self._method = get_method(recipe.method)
        _check_batch(recipe, self._world)

        # Networks.
        online, target = build_networks(recipe)
        if self.device.type == "cpu" and self.autocast_dtype is torch.bfloat16:
            check_bf16_on_cpu(online.backbone, (view.size for view in recipe.views))
        channels_last = execution.channels_last and is_convolutional(online.backbone)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.online = to_memory_format(online.to(self.device), self._memory_format)
        self.target = None
        if needs_target_network(recipe, self._method):
            self.target = to_memory_format(target.to(self.device), self._memory_format)
        elif self._method.keys == "all" and self._world.size * recipe.accumulate > 1:
            raise InputError(
                f"Recipe.method is {recipe.method!r}, whose targets are online embeddings of all images of a step: it "
                "takes one process and accumulate 1, or a target network."
            )
        self._ema = None if self.target is None else TargetUpdate(self.target, self.online)
        self._has_dropout = _has_dropout(self.online)
        if execution.checkpointing:
            checkpoint_blocks(self.online.backbone, recipe.backbone.name, random=_has_dropout(self.online.backbone))
        wants_graph = wants_capture(
            execution.cuda_graph,
            self.device,
            ranks=self._world.size,
            restores_random=execution.checkpointing and _has_dropout(self.online.backbone),
        )

        # Optimiser.
        self._parameters = [parameter for parameter in self.online.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.online, recipe.optimizer)
        rates_to_device(self.optimizer, recipe.optimizer)
        self.scaler = GradScaler(self.device.type, enabled=self.autocast_dtype is torch.float16)
        dtype = torch.promote_types(self._parameters[0].dtype, torch.float32)
        self._one_minus_tau = torch.zeros((), dtype=dtype, device=self.device)

        # Which views pass together, which embedding meets which target, with what weight.
        self.view_by_view = self.online.unbatchable
        self._plan = make_plan(
            recipe.views,
            joint=execution.step_mode == "joint",
            grouped=group_views and self.view_by_view is None,
            targets_first=self.target is None,
        )
        self._targets = target_views(recipe.views)
        weights = [task.weight for task in task_pairs(recipe.views, recipe.task_weights)]
        self._weights = torch.tensor(weights, device=self.device)  # [T]

        # Compilation and the CUDA graph wrap the functions below. Warm-up, recording and replays share one stream, and
        # DistributedDataParallel must be built in it.
        compiled = wants_compile(recipe, execution, self.device, ranks=self._world.size)
        networks = [self.online] if self.target is None else [self.online, self.target]
        self._compiler = Compiler(networks, enabled=compiled, ranks=self._world.size)
        self._embed_targets = None if self.target is None else self._compiler(self.target.embed)
        stream: Any = torch.cuda.Stream(self.device) if wants_graph else None  # type: ignore[no-untyped-call]  # torch's
        with in_stream(stream):
            online_loss = OnlineLoss(self.online, recipe, self._method, self._plan, compiler=self._compiler)
            self._online_loss = online_loss if self._world.size == 1 else _data_parallel(online_loss)
        self._gradients = self._compiler.guard(self._forward_backward)
        self._graph = StepGraph(
            self._device_step,
            self._discard_gradients,
            wanted=wants_graph,
            asked=execution.cuda_graph == "on",
            warm_up=WARM_UP if self._world.size == 1 else WARM_UP_RANKS,
            stream=stream,
            graph=lambda: CudaGraph(stream),
        )

    def __call__(self, views: Sequence[Tensor], step: int) -> StepOutput:
        """Train on one batch.

        Args:
            views: one [B, 3, S, S] tensor per view of the recipe, on the device, in `input_dtype` or float32; B is the
                per-rank batch.
            step: number of this update in the run, from 0.

        Raises:
            InputError: the number, shapes or dtypes of the views are not those of the recipe, or of earlier steps.
        """
        self._check_views(views)
        if self._has_dropout:
            self._seed(step)
        lr, tau = self._set_rates(step)
        stacks = stack_views(
            self._plan,
            views,
            micro_batches=self.recipe.accumulate,
            memory_format=self._memory_format,
            out=self._graph.inputs,
        )
        losses, loss, embedding, grad_norm = self._graph(stacks)  # runs, records or replays _device_step
        return StepOutput(losses=losses, loss=loss, embedding=embedding, grad_norm=grad_norm, lr=lr, tau=tau)

    # The step on the device, in the order of the paper.

    def _device_step(self, stacks: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All work of a step on the device: losses [T], loss [], embedding [B, out], gradient norm []."""
        self._update_target()
        losses, loss, embedding = self._gradients(stacks)  # _forward_backward, compiled if that works
        grad_norm = self._clip_and_update()
        return losses, loss, embedding, grad_norm

    def _update_target(self) -> None:
        """Move the target network: an EMA of the online network, or (SimSiam) the online network itself."""
        if self._ema is None:
            return
        if self._method.target_rule == "ema":
            self._ema.average(self._one_minus_tau)
        else:
            self._ema.copy()

    def _forward_backward(self, stacks: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Accumulate the gradients of a batch in the online network; losses [T], loss [] and embedding [B, out].

        N micro-batches give the numbers of N times as many ranks. Gradients are averaged over the ranks during the last
        backward.

        Args:
            stacks: [accumulate, V * B / accumulate, 3, S, S] for each of the plan's stacks (`stack_views`).
        """
        micro_batches = [[stack[m] for stack in stacks] for m in range(self.recipe.accumulate)]
        targets = self._target_embeddings(micro_batches)  # of all micro-batches: predictions may meet all of them
        all_losses, embeddings = [], []
        for m, micro_batch in enumerate(_keep_first_statistics(self.online, micro_batches)):
            losses: list[Tensor] = []
            for g, group in enumerate(self._plan.online):
                last = m == len(micro_batches) - 1 and g == len(self._plan.online) - 1
                with self._average_over_ranks(last):
                    with self._autocast(), self._sync_batchnorm("online"):
                        images = [self._plan.cut(micro_batch, batch) for batch in group.batches]
                        z, group_losses, total = self._online_loss(g, images, targets[m])
                    torch.autograd.backward(self.scaler.scale(total * (1 / len(micro_batches))))
                losses.append(group_losses)
                if g == 0:
                    embeddings.append(z[0].detach())
                # Without a target network the first group's own embeddings are the targets of all groups.
                targets[m] = targets[m] or [z[group.views.index(t)].detach() for t in self._targets]
            all_losses.append(losses[0] if len(losses) == 1 else torch.stack(losses).sum(dim=0))  # [T]
        totals = [(self._weights.to(losses.dtype) * losses).sum() for losses in all_losses]
        if len(micro_batches) == 1:
            return all_losses[0], totals[0], embeddings[0]
        return torch.stack(all_losses).mean(dim=0), torch.stack(totals).mean(), torch.cat(embeddings)

    @torch.no_grad()
    def _target_embeddings(self, micro_batches: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Targets for each micro-batch and target view: [B, out], or with in-batch negatives [all images, out].

        Empty lists if the online embeddings are the targets.
        """
        if self._embed_targets is None or self.target is None:
            return [[] for _ in micro_batches]
        group, embeddings = self._plan.targets, []
        with self._autocast(), self._sync_batchnorm("target"):
            for micro_batch in _keep_first_statistics(self.target, micro_batches):
                images = [self._plan.cut(micro_batch, batch) for batch in group.batches]
                embeddings.append(self._embed_targets(images, group))  # [targets, B, out]
        if self._method.keys != "all":
            return [list(z.unbind()) for z in embeddings]
        size = embeddings[0].shape[1]
        keys = [self._world.gather_own_first(torch.cat(view)) for view in zip(*embeddings, strict=True)]
        # This rank's micro-batches come first. Each meets its own keys first, then those behind it, in a ring.
        return [[view_keys.roll(-m * size, 0) for view_keys in keys] for m in range(len(micro_batches))]

    def _clip_and_update(self) -> Tensor:
        """Update the online network and clear its gradients; the gradient norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.recipe.optimizer.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.recipe.optimizer.clip_grad_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    # Contexts of a forward or backward.

    def _autocast(self) -> torch.autocast:
        """Autocast for a forward; a no-op in float32."""
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def _sync_batchnorm(self, network: Literal["online", "target"]) -> AbstractContextManager[object]:
        """BatchNorm statistics over all ranks in this network's forward, if the recipe asks for it."""
        asked = self.recipe.sync_batchnorm in (network, "both") and self._world.size > 1
        return SyncBatchNorm(self._world.size) if asked else nullcontext()

    def _average_over_ranks(self, last: bool) -> AbstractContextManager[object]:
        """Gradients are averaged over the ranks in the last backward, and only accumulated before."""
        if last or not isinstance(self._online_loss, DistributedDataParallel):
            return nullcontext()
        return self._online_loss.no_sync()

    # What happens on the host before a step.

    def _check_views(self, views: Sequence[Tensor]) -> None:
        """Check the shapes of a batch, which must be those of every batch."""
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
        """Seed the layers' random numbers (stochastic depth) by (seed, step, rank), so that resuming repeats them."""
        words = np.random.SeedSequence([self.recipe.seed, step, self._world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> np.uint64(1)))

    def _set_rates(self, step: int) -> tuple[float, float]:
        """Write learning rates, weight decay and EMA momentum into their device tensors; learning rate and tau."""
        lr = apply_rates(
            self.optimizer,
            self.recipe.optimizer,
            batch_size=self.recipe.batch_size,
            step=step,
            steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        if self._method.target_rule != "ema":
            return lr, 0.0
        tau = ema_momentum(step, self.total_steps, self.recipe.target_decay)
        self._one_minus_tau.fill_(1.0 - tau)
        return lr, tau

    # State and description.

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume; tensors are not copied. Waits for the device."""
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
            RuntimeError, ValueError, KeyError, TypeError: names, shapes or numbers are not those of this step.
        """
        check_optimizer_state(self.optimizer, state["optimizer"])
        self._graph.drop()  # it replays on the old tensors
        self.online.load_state_dict(state["online"])
        if self.target is not None:
            self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # optimisers keep the tensors they are given
        rates_to_device(self.optimizer, self.recipe.optimizer)
        if state["scaler"]:  # empty if the steps before were not in fp16
            check_scaler_state(state["scaler"])
            self.scaler.load_state_dict(state["scaler"])

    def _discard_gradients(self) -> None:
        """Clear what a failed recording left behind in Python; none of it ran on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        # A scaler that has unscaled waits for its update, which never ran.
        self.scaler._per_optimizer_states.clear()

    @property
    def compiled(self) -> bool:
        """Whether forward and backward run compiled (no longer after a failed compilation)."""
        return self._compiler.compiled

    @property
    def captured(self) -> bool:
        """Whether steps are replays of a CUDA graph by now."""
        return self._graph.captured

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being recorded; other threads should not launch on the device meanwhile."""
        return self._graph.capturing

    @property
    def warm_up(self) -> int:
        """Number of first steps that compile or record; later ones are all alike."""
        return self._graph.warm_up

    @property
    def description(self) -> str:
        """How steps run by now, e.g. "compiled, views of one size batched, one CUDA graph"."""
        how = ["compiled" if self.compiled else "not compiled"]
        if self.execution.step_mode == "per-view":
            how.append("one backward per view")
        else:
            how.append("views of one size batched" if self.view_by_view is None else "sequential views")
        if self.execution.checkpointing:
            how.append("activations recomputed block by block")
        if self.device.type == "cuda":
            how.append("one CUDA graph" if self.captured else "launched kernel by kernel")
        return ", ".join(how)


class OnlineLoss(nn.Module):
    """Online network and losses for one group of views: the part that is compiled and that DDP wraps."""

    def __init__(
        self, online: OnlineNetwork, recipe: Recipe, method: Method, plan: BatchingPlan, *, compiler: Compiler
    ) -> None:
        super().__init__()
        self.online = online
        self._groups = plan.online
        self._loss = method.make_loss(recipe)
        self._tasks = task_pairs(recipe.views, recipe.task_weights)
        self._targets = target_views(recipe.views)
        self._slots = predictor_slots(recipe.views, recipe.predictors)
        # With one backward per view the groups differ in their losses: only the encoder is compiled, once per size.
        joint = len(plan.online) == 1
        self._compute = compiler(self._forward) if joint else self._forward
        self._encode = self.online.embed if joint else compiler(self.online.embed)

    def forward(self, g: int, images: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Embed, predict and compare with the targets.

        Args:
            g: number of the group.
            images: [V * B, 3, S, S] for each size batch of the group.
            targets: [N, out] for each target view; empty to take the group's own embeddings, detached.

        Returns:
            Embeddings z [V, B, out] in the order of the group's views; losses [T], detached: what the group adds to the
            mean of each task over its pairs; their weighted total [], with gradient.
        """
        result: tuple[Tensor, Tensor, Tensor] = self._compute(g, images, targets)
        return result

    def _forward(self, g: int, images: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        group = self._groups[g]
        z = self._encode(images, group)  # [V, B, out]
        predictions = self.online.predictors(z, tuple(self._slots[v] for v in group.views))  # [V, B, out]
        losses = self._losses(group, predictions, targets or [z[group.views.index(t)].detach() for t in self._targets])
        total = torch.stack([task.weight * loss for task, loss in zip(self._tasks, losses, strict=True)]).sum()
        return z, torch.stack(losses).detach(), total

    def _losses(self, group: ViewGroup, predictions: Tensor, targets: list[Tensor]) -> list[Tensor]:
        """Each task's loss over the group's views, divided by all of the task's pairs; 0 if none is of the task."""
        rows = {v: row for row, v in enumerate(group.views)}
        target_of = dict(zip(self._targets, targets, strict=True))
        zero = predictions.new_zeros((), dtype=torch.promote_types(predictions.dtype, torch.float32))
        losses = []
        for task in self._tasks:
            terms = [self._loss(predictions[rows[v]], target_of[t]) for v, t in task.pairs if v in rows]
            losses.append(torch.stack(terms).sum() / len(task.pairs) if terms else zero)
        return losses


def needs_target_network(recipe: Recipe, method: Method) -> bool:
    """Whether a separate target network is needed.

    If the target is the online network itself (SimSiam), the detached online embeddings are the targets, except for
    views that the online network does not embed, and with stochastic depth, which targets do not have.
    """
    target_only = any(spec.is_target and spec.task is None for spec in recipe.views)
    return method.target_rule != "same" or target_only or recipe.backbone.drop_path > 0


def _keep_first_statistics(network: nn.Module, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
    """The micro-batches; after the last one the network's running statistics are set to those of the first one.

    N ranks would keep those of rank 0.
    """
    buffers = list(network.buffers()) if len(micro_batches) > 1 else []
    first: list[Tensor] = []
    for m, micro_batch in enumerate(micro_batches):
        if m == 1:
            first = [buffer.clone() for buffer in buffers]
        yield micro_batch
    if first:
        with torch.no_grad():
            torch._foreach_copy_(buffers, first)


def _data_parallel(module: OnlineLoss) -> DistributedDataParallel:
    """Average the gradients over the ranks. Buffers stay per rank, as BatchNorm statistics are."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # in torch 2.14
    own_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **own_buffers)


def _has_dropout(network: nn.Module) -> bool:
    """Whether layers use random numbers in training (stochastic depth, dropout)."""
    rates = ("drop_prob", "p")  # timm's DropPath, torch's Dropout
    return any(
        isinstance(getattr(module, name, None), float) and getattr(module, name) > 0
        for module in network.modules()
        for name in rates
    )


def _check_batch(recipe: Recipe, world: World) -> None:
    """Check that the batch divides among ranks and micro-batches."""
    pieces = world.size * recipe.accumulate
    if recipe.batch_size % pieces:
        raise invalid(
            "Recipe.batch_size",
            recipe.batch_size,
            f"a multiple of {world.size} ranks times {recipe.accumulate} micro-batches (accumulate)",
            "give each rank and micro-batch as many images" + _other_accumulate(recipe, world),
        )
    if recipe.batch_size // pieces < 2:
        raise invalid(
            "Recipe.batch_size",
            recipe.batch_size,
            f"at least {2 * pieces} on {world.size} ranks with {recipe.accumulate} micro-batches (accumulate)",
            "raise it, or take fewer micro-batches" + _other_accumulate(recipe, world),
        )


def _other_accumulate(recipe: Recipe, world: World) -> str:
    """Words on the numbers of micro-batches that divide the batch; "" if there are none."""
    images, rest = divmod(recipe.batch_size, world.size)
    divisors = [] if rest else [str(n) for n in range(1, images // 2 + 1) if images % n == 0]
    return f" (--accumulate {' or '.join(divisors)})" if divisors else ""
