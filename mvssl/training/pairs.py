"""Which prediction meets which target, with what weight: data, worked out once from the views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

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
    """Pair every view of a task with every target of another view (SPEC section 4); tasks in order of appearance.

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
