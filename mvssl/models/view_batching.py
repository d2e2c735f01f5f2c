"""Plans a step from its views: which views form one batch, and which prediction meets which target with what weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipelines.views.spec import ViewSpec, tasks


class TaskPairs(NamedTuple):
    """One term of the loss: weight * mean over pairs of the pair loss.

    Attributes:
        task: the task's name.
        weight: its weight in the total.
        pairs: (online view, target view), both as positions in the recipe's views.
    """

    task: str
    weight: float
    pairs: tuple[tuple[int, int], ...]


def task_pairs(specs: Sequence[ViewSpec], weights: Mapping[str, float]) -> tuple[TaskPairs, ...]:
    """For each task, in order of appearance, the pairs of its views with every target of another view.

    Args:
        specs: the views, checked by `check_views`.
        weights: by task; 1 where missing (PAPER.md section 4).
    """
    targets = target_views(specs)
    return tuple(
        TaskPairs(
            task,
            weights.get(task, 1.0),
            tuple((v, t) for v, spec in enumerate(specs) if spec.task == task for t in targets if t != v),
        )
        for task in tasks(specs)
    )


def online_views(specs: Sequence[ViewSpec]) -> tuple[int, ...]:
    """Positions of the views that the online network embeds (those with a task), targets first."""
    online = (v for v, spec in enumerate(specs) if spec.task is not None)
    return tuple(sorted(online, key=lambda v: not specs[v].is_target))


def target_views(specs: Sequence[ViewSpec]) -> tuple[int, ...]:
    """Positions of the views that the target network embeds."""
    return tuple(v for v, spec in enumerate(specs) if spec.is_target)


def predictor_slots(specs: Sequence[ViewSpec], predictors: Literal["per-view", "shared"]) -> dict[int, int]:
    """Predictor slot of each online view: the index of its task, or 0 for all with a shared predictor."""
    keys = tasks(specs)
    online = {v: task for v in online_views(specs) if (task := specs[v].task) is not None}
    return {v: 0 if predictors == "shared" else keys.index(task) for v, task in online.items()}


class SizeBatch(NamedTuple):
    """Views of one size that pass through the backbone as one batch.

    Attributes:
        stack: index of the stack that contains them, in `BatchingPlan.stacks`.
        begin, end: their slots in the stack.
        positions: of each in the views of its `ViewGroup`.
    """

    stack: int
    begin: int
    end: int
    positions: tuple[int, ...]


class ViewGroup(NamedTuple):
    """Views that share a forward and, if trained, a backward.

    Attributes:
        views: positions in the recipe, in the order of their embeddings and of running statistics.
        batches: the same views, by size.
    """

    views: tuple[int, ...]
    batches: tuple[SizeBatch, ...]

    @property
    def norm_views(self) -> int:
        """Number of views that BatchNorms normalise separately; 1 if every view has a forward of its own."""
        return len(self.views) if any(len(batch.positions) > 1 for batch in self.batches) else 1


@dataclass(frozen=True, kw_only=True)
class BatchingPlan:
    """How the views of a step are batched.

    Attributes:
        stacks: the views (positions in the recipe) concatenated in each input tensor of the step.
        targets: the group that the target network embeds, if there is one.
        online: the groups that the online network embeds, each with its own backward.
    """

    stacks: tuple[tuple[int, ...], ...]
    targets: ViewGroup
    online: tuple[ViewGroup, ...]

    def cut(self, stacks: Sequence[Tensor], batch: SizeBatch) -> Tensor:
        """The views of a size batch as a slice of a micro-batch's stacks [V * B, 3, S, S]."""
        stack = stacks[batch.stack]
        images = len(stack) // len(self.stacks[batch.stack])
        return stack[batch.begin * images : batch.end * images]


def make_plan(specs: Sequence[ViewSpec], *, joint: bool, grouped: bool, targets_first: bool) -> BatchingPlan:
    """Plan how views are batched.

    Args:
        specs: the views, checked by `check_views`.
        joint: whether all views share one backward, or have one each.
        grouped: whether views of one size form one batch in a joint step.
        targets_first: whether, with one backward per view, the target views share the first: needed where online
            embeddings are the targets.
    """
    online, targets = online_views(specs), target_views(specs)
    grouped = grouped and joint
    # Target-only views, then targets that are online too, then the rest: each network's views are contiguous.
    order = sorted(range(len(specs)), key=lambda v: (not specs[v].is_target, v in online, v))
    stacks: tuple[tuple[int, ...], ...] = tuple((v,) for v in range(len(specs)))
    if grouped:
        sizes = dict.fromkeys(specs[v].size for v in order)  # in order of appearance
        stacks = tuple(tuple(v for v in order if specs[v].size == size) for size in sizes)
    first = targets if targets_first else ()
    if joint:
        members: list[tuple[int, ...]] = [online]
    else:
        members = [group for group in (first, *((v,) for v in online if v not in first)) if group]
    return BatchingPlan(
        stacks=stacks,
        targets=_group(targets, stacks),
        online=tuple(_group(views, stacks) for views in members),
    )


def _group(views: tuple[int, ...], stacks: Sequence[tuple[int, ...]]) -> ViewGroup:
    """The group of these views: a size batch per stack that contains some of them, in order of their first view."""
    batches = []
    for number, stack in enumerate(stacks):
        rows = [row for row, v in enumerate(stack) if v in views]
        if rows:
            positions = tuple(views.index(stack[row]) for row in rows)
            batches.append(SizeBatch(stack=number, begin=rows[0], end=rows[-1] + 1, positions=positions))
    return ViewGroup(views=views, batches=tuple(sorted(batches, key=lambda batch: batch.positions[0])))


def stack_views(
    plan: BatchingPlan,
    views: Sequence[Tensor],
    *,
    micro_batches: int,
    memory_format: torch.memory_format,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Concatenate the views of each stack, micro-batch by micro-batch.

    Args:
        plan: the stacks.
        views: [B, 3, S, S] each.
        micro_batches: number of micro-batches, M.
        memory_format: of the images.
        out: tensors of an earlier call to overwrite; None allocates.

    Returns:
        [M, V * B / M, 3, S, S] for each stack. A stack of one view is not copied without `out`.
    """
    results: list[Tensor] = []
    for number, members in enumerate(plan.stacks):
        first = views[members[0]]
        if out is None and len(members) == 1:
            results.append(torch.unflatten(first.contiguous(memory_format=memory_format), 0, (micro_batches, -1)))
            continue
        rows = (len(members) * len(first), *first.shape[1:])
        stack = (
            torch.empty(rows, dtype=first.dtype, device=first.device, memory_format=memory_format)
            if out is None
            else out[number].flatten(0, 1)
        )
        by_micro_batch = torch.unflatten(stack, 0, (micro_batches, len(members), -1))  # [M, V, B / M, 3, S, S]
        for row, v in enumerate(members):
            by_micro_batch[:, row].copy_(torch.unflatten(views[v], 0, (micro_batches, -1)))
        results.append(torch.unflatten(stack, 0, (micro_batches, -1)))
    return results
