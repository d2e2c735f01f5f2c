"""Which views pass through a network together: data, worked out once from the views.

Which prediction meets which target, with what weight: data, worked out once from the views.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """Pair every view of a task with every target of another view (PAPER.md section 4); tasks in order of appearance.

    Args:
        specs: the views, checked by `check_views`.
        weights: weight by task; a task that is not named weighs 1.
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
    """Positions of the views that the online network embeds, those with a task, in the order it does.

    Targets come first (as in the paper's presets): where the target is the online network itself, the others meet them.
    """
    online = (v for v, spec in enumerate(specs) if spec.task is not None)
    return tuple(sorted(online, key=lambda v: not specs[v].is_target))


def target_views(specs: Sequence[ViewSpec]) -> tuple[int, ...]:
    """Positions of the views that the target network embeds."""
    return tuple(v for v, spec in enumerate(specs) if spec.is_target)


def predictor_slots(specs: Sequence[ViewSpec], predictors: Literal["per-view", "shared"]) -> dict[int, int]:
    """Slot of the predictor bank for each online view: its task's, or 0 for all when one predictor is shared."""
    keys = tasks(specs)
    named = {v: task for v in online_views(specs) if (task := specs[v].task) is not None}
    return {v: 0 if predictors == "shared" else keys.index(task) for v, task in named.items()}


class Block(NamedTuple):
    """Views of one size that go through the backbone as one batch.

    Attributes:
        stack: the stack (of `Plan.stacks`) they lie in.
        begin, end: their places there, one behind the other.
        places: place of each among the views of its `Group`.
    """

    stack: int
    begin: int
    end: int
    places: tuple[int, ...]


class Group(NamedTuple):
    """Views that share a forward and, if trained, a backward.

    Attributes:
        views: their positions in the recipe, in the order of their embeddings and of running statistics.
        blocks: the same views, by size.
    """

    views: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def of(self) -> int:
        """What BatchNorms have to know: how many views there are, or 1 where each view passes alone."""
        return len(self.views) if any(len(block.places) > 1 for block in self.blocks) else 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the views of a step pass.

    Attributes:
        stacks: views (positions in the recipe) that lie in one tensor, for each tensor.
        targets: what the target network embeds, if there is one.
        online: what the online network embeds, one graph after the other.
    """

    stacks: tuple[tuple[int, ...], ...]
    targets: Group
    online: tuple[Group, ...]

    def cut(self, stacks: Sequence[Tensor], block: Block) -> Tensor:
        """The views of a block out of one part's stacks [V * B, 3, S, S], without a copy."""
        stack = stacks[block.stack]
        images = len(stack) // len(self.stacks[block.stack])
        return stack[block.begin * images : block.end * images]


def make_plan(specs: Sequence[ViewSpec], *, joint: bool, grouped: bool, targets_first: bool) -> Plan:
    """Plan the passes of a step.

    Args:
        specs: the views, checked by `check_views`.
        joint: one graph for all views, or one for each.
        grouped: whether views of one size of a joint graph form one batch.
        targets_first: without a joint graph, let the target views (which are online embeddings) share the first one.
    """
    online, targets = online_views(specs), target_views(specs)
    grouped = grouped and joint
    # Target-only views, then targets that are online views too, then the others: both networks' views are neighbours.
    order = sorted(range(len(specs)), key=lambda v: (not specs[v].is_target, v in online, v))
    stacks = tuple(_by_size(specs, order)) if grouped else tuple((v,) for v in range(len(specs)))
    first = targets if targets_first else ()
    if joint:
        members: list[tuple[int, ...]] = [online]
    else:
        members = [group for group in (first, *((v,) for v in online if v not in first)) if group]
    return Plan(
        stacks=stacks,
        targets=_group(targets, stacks),
        online=tuple(_group(views, stacks) for views in members),
    )


def _by_size(specs: Sequence[ViewSpec], views: Iterable[int]) -> list[tuple[int, ...]]:
    """Views of equal sizes together, in order of appearance."""
    sizes: dict[int, list[int]] = {}
    for v in views:
        sizes.setdefault(specs[v].size, []).append(v)
    return [tuple(members) for members in sizes.values()]


def _group(views: tuple[int, ...], stacks: Sequence[tuple[int, ...]]) -> Group:
    """The group of these views: a block for each stack that holds some of them, in order of their first view."""
    blocks = []
    for number, stack in enumerate(stacks):
        rows = [row for row, v in enumerate(stack) if v in views]
        if rows:
            places = tuple(views.index(stack[row]) for row in rows)
            blocks.append(Block(stack=number, begin=rows[0], end=rows[-1] + 1, places=places))
    return Group(views=views, blocks=tuple(sorted(blocks, key=lambda block: block.places[0])))


def stack_views(
    plan: Plan,
    views: Sequence[Tensor],
    *,
    parts: int,
    memory_format: torch.memory_format,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Lay the views of each stack behind one another.

    Args:
        plan: says which.
        views: [B, 3, S, S] each.
        parts: parts of the batch that pass one after the other.
        memory_format: of the images.
        out: tensors to write to, made by this function for such views; None makes new ones.

    Returns:
        One tensor [parts, V * B / parts, 3, S, S] for each stack. What is one view alone is not copied without `out`.
    """
    results: list[Tensor] = []
    for number, members in enumerate(plan.stacks):
        first = views[members[0]]
        if out is None and len(members) == 1:
            results.append(torch.unflatten(first.contiguous(memory_format=memory_format), 0, (parts, -1)))
            continue
        rows = (len(members) * len(first), *first.shape[1:])
        stack = (
            torch.empty(rows, dtype=first.dtype, device=first.device, memory_format=memory_format)
            if out is None
            else out[number].flatten(0, 1)
        )
        by_part = torch.unflatten(stack, 0, (parts, len(members), -1))  # [parts, V, B / parts, 3, S, S]
        for row, v in enumerate(members):
            by_part[:, row].copy_(torch.unflatten(views[v], 0, (parts, -1)))
        results.append(torch.unflatten(stack, 0, (parts, -1)))
    return results
