"""The objective of a step: views in, gradients and losses out (SPEC sections 3 and 4)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from mvssl.distributed import World
from mvssl.methods import Method
from mvssl.networks.encoder import OnlineNetwork
from mvssl.networks.passes import Plan
from mvssl.networks.sync_batchnorm import SyncBatchNorm
from mvssl.networks.target import TargetNetwork
from mvssl.recipe import Recipe
from mvssl.training.compiled.compiling import Compiler
from mvssl.training.online_pass import OnlinePass
from mvssl.training.pairs import target_views, task_pairs
from pipelines.errors import InputError, invalid

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
