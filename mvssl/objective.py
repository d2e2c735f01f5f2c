"""The objective of a step: views in, gradients and losses out (SPEC sections 3 and 4)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mvssl.compiling import Encoders
from mvssl.distributed import World
from mvssl.methods import Method
from mvssl.network import OnlineNetwork, OnlinePass
from mvssl.pairs import online_views, predictor_slots, target_views, task_pairs
from mvssl.recipe import Recipe
from mvssl.stacked import StackedBatchNorm
from mvssl.sync_batchnorm import SyncBatchNorm
from mvssl.target import TargetNetwork
from pipelines.errors import InputError, invalid

_ONLINE, _TARGET = 0, 1  # positions in `Encoders`


def needs_target_network(recipe: Recipe, method: Method) -> bool:
    """Whether targets take a network and a forward of their own.

    Where the target is the online network itself (SimSiam), the online embeddings without gradient are the targets, but
    for views that the online network does not embed, and for stochastic depth, which the target has not.
    """
    target_only = any(spec.is_target and spec.task is None for spec in recipe.views)
    return method.target_rule != "same" or target_only or recipe.backbone.drop_path > 0


def check_accumulation(recipe: Recipe, method: Method, online: nn.Module) -> None:
    """Check that a batch that goes through in parts gives the numbers of the whole batch.

    Raises:
        InputError: it does not, because images of a batch meet in BatchNorm or in the loss.
    """
    if recipe.accumulate == 1:
        return
    if method.keys == "all":
        raise InputError(
            f"Recipe.accumulate is {recipe.accumulate} but must be 1 for {recipe.method}, whose loss compares all "
            "images of a step: set accumulate to 1, and step_mode to per-view to save memory."
        )
    for name, module in online.named_modules():
        if isinstance(module, _BatchNorm | StackedBatchNorm):
            raise InputError(
                f"Recipe.accumulate is {recipe.accumulate} but must be 1 for networks with BatchNorm (here {name}), "
                "whose statistics are those of the whole batch: set accumulate to 1 and step_mode to per-view, or take "
                "a backbone without BatchNorm and heads with norm layer."
            )


class Objective:
    """Adds the gradients of one batch to the online network's parameters.

    One graph of all views (step_mode joint) or view by view (per-view) with the same numbers. On several ranks the
    gradients are averaged over them during the last backward.

    Attributes:
        compiled: whether the encoders run compiled.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        online: OnlineNetwork,
        target: TargetNetwork | None,
        *,
        world: World,
        compiled: bool,
        autocast: torch.dtype | None,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Wrap networks that are on their device; `target` is None where `needs_target_network` says so."""
        self._recipe = recipe
        self._loss = method.make_loss(recipe)
        self._gathers = method.keys == "all"
        self._world = world
        self._autocast_dtype = autocast
        self._scaler = scaler
        self._device_type = next(online.parameters()).device.type
        self._tasks = task_pairs(recipe.views, recipe.task_weights)
        self._targets = target_views(recipe.views)
        self._slots = predictor_slots(recipe.views, recipe.predictors)
        self._has_target = target is not None
        self._groups = _groups(recipe, shared_target=target is None)
        modules = [online] if target is None else [online, target]
        self._encoders = Encoders(modules, compiled=compiled, ranks=world.size)
        one_pass = OnlinePass(online, lambda view: self._encoders(_ONLINE, view))
        self._pass = one_pass if world.size == 1 else _data_parallel(one_pass)

    @property
    def compiled(self) -> bool:
        """Whether the encoders run compiled (not after a failure to compile)."""
        return self._encoders.compiled

    def __call__(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Add up the gradients of a batch.

        Args:
            views: one [B, 3, S, S] per view of the recipe, on the device.

        Returns:
            losses [T], each task's mean over its pairs, unweighted; embedding [B, out] of the first online view.
        """
        return self._encoders.run(lambda: self._parts(views))

    def total(self, losses: Tensor) -> Tensor:
        """The weighted sum of the losses [T]."""
        return torch.stack([task.weight * loss for task, loss in zip(self._tasks, losses, strict=True)]).sum()

    def _parts(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The batch in `accumulate` parts one after the other."""
        parts = self._recipe.accumulate
        results = [
            self._add(chunks, share=1 / parts, last=n == parts - 1)
            for n, chunks in enumerate(zip(*(view.chunk(parts) for view in views), strict=True))
        ]
        losses = torch.stack([losses for losses, _ in results]).mean(dim=0)  # [T]
        return losses, torch.cat([embedding for _, embedding in results])

    def _add(self, views: Sequence[Tensor], *, share: float, last: bool) -> tuple[Tensor, Tensor]:
        """Add `share` of the gradients of these images; average them over the ranks with the `last` backward."""
        targets = self._embed_targets(views) if self._has_target else {}
        losses: list[list[Tensor]] = [[] for _ in self._tasks]  # of each task, detached
        embedding: Tensor | None = None
        for group in self._groups:
            with self._gradients(averaged=last and group is self._groups[-1]):
                with self._autocast(), self._synchronised("online"):
                    z, predictions = self._pass([views[v] for v in group], tuple(self._slots[v] for v in group))
                    if not self._has_target:
                        embeddings = dict(zip(group, z.detach(), strict=True))
                        targets |= {v: self._keys(embeddings[v]) for v in group if v in self._targets}
                    by_view = dict(zip(group, predictions, strict=True))
                    weighted = []
                    for task, terms in zip(self._tasks, losses, strict=True):
                        pairs = [self._loss(by_view[v], targets[t]) for v, t in task.pairs if v in by_view]
                        if pairs:
                            term = torch.stack(pairs).sum() / len(task.pairs)
                            weighted.append(task.weight * term)
                            terms.append(term.detach())
                torch.autograd.backward(self._scaler.scale(share * torch.stack(weighted).sum()))
            embedding = z[0].detach() if embedding is None else embedding
        if embedding is None:
            raise AssertionError("check_views makes sure that a view has a task")
        return torch.stack([torch.stack(terms).sum() for terms in losses]), embedding

    @torch.no_grad()
    def _embed_targets(self, views: Sequence[Tensor]) -> dict[int, Tensor]:
        """What predictions meet, by the position of the target view: [B, out], or [ranks * B, out]."""
        with self._autocast(), self._synchronised("target"):
            return {t: self._keys(self._encoders(_TARGET, views[t])) for t in self._targets}

    def _keys(self, target: Tensor) -> Tensor:
        """A target view's embeddings [B, out], with those of the other ranks behind them where the loss needs them."""
        return self._world.gather_own_first(target) if self._gathers else target

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


def _data_parallel(one_pass: OnlinePass) -> DistributedDataParallel:
    """Average the gradients over the ranks; buffers stay each rank's own, as its BatchNorm statistics are."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # in torch 2.14
    own_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(one_pass, gradient_as_bucket_view=True, **own_buffers)


def _groups(recipe: Recipe, *, shared_target: bool) -> tuple[tuple[int, ...], ...]:
    """Positions of the views that share a graph: all, or each alone (but for targets that are online embeddings)."""
    views = online_views(recipe.views)
    if recipe.step_mode == "joint":
        return (views,)
    first = target_views(recipe.views) if shared_target else ()
    return tuple(group for group in (first, *((v,) for v in views if v not in first)) if group)


def check_batch(recipe: Recipe, world: World) -> int:
    """Images per step of each rank.

    Raises:
        InputError: the batch does not divide among the ranks and parts, or leaves BatchNorm a single image.
    """
    if recipe.batch_size % (world.size * recipe.accumulate):
        raise invalid(
            "Recipe.batch_size",
            recipe.batch_size,
            f"a multiple of {world.size} ranks times {recipe.accumulate} parts (accumulate)",
            "give each rank and part as many images",
        )
    share = recipe.batch_size // world.size
    if share < 2:
        raise invalid(
            "Recipe.batch_size", recipe.batch_size, f"at least {2 * world.size} on {world.size} ranks", "raise it"
        )
    return share
