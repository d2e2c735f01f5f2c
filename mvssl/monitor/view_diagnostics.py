"""Compares the gradients of single views, as a sign of conflict between tasks that share weights.

Tasks conflict if their gradients agree less than those of two views of one task (Yu et al., Gradient surgery for
multi-task learning, arXiv 2001.06782).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from mvssl.config.recipe import Recipe
from mvssl.methods import get_method
from mvssl.models.encoder import OnlineNetwork, TargetNetwork
from mvssl.models.view_batching import online_views, predictor_slots, task_pairs
from mvssl.monitor.collapse import effective_rank, embedding_std
from pipelines.views.spec import ViewSpec


@dataclass(frozen=True, kw_only=True)
class ViewDiagnostics:
    """Gradients and ranks of networks on some batches.

    Attributes:
        encoder: gradient of backbone and projector by view, float32 [P]: of the view's own loss, the mean over its
            targets, averaged over the batches.
        predictor: the same of the bank of predictors, all slots.
        prediction_rank: effective rank of the predictions of each task's first view, by task.
        embedding_rank: effective rank of the online embeddings of the first view.
        embedding_std: `mvssl.monitor.collapse.embedding_std` of those.
    """

    encoder: dict[int, Tensor]
    predictor: dict[int, Tensor]
    prediction_rank: dict[str, float]
    embedding_rank: float
    embedding_std: float


def view_diagnostics(
    recipe: Recipe, online: OnlineNetwork, target: TargetNetwork | None, batches: Iterable[Sequence[Tensor]]
) -> ViewDiagnostics:
    """Compute the gradient of each view's loss on its own.

    Nothing is updated but BatchNorm's running statistics, as in any forward in train mode: pass copies.

    Args:
        recipe: of the networks.
        online: in train mode, on the views' device.
        target: likewise; None where online embeddings are the targets.
        batches: views as `TrainStep` takes them, [B, 3, S, S] each.
    """
    loss = get_method(recipe.method).make_loss(recipe)
    slots = predictor_slots(recipe.views, recipe.predictors)
    targets_of: dict[int, list[int]] = defaultdict(list)  # by online view
    for task in task_pairs(recipe.views, recipe.task_weights):
        for view, other in task.pairs:
            targets_of[view].append(other)
    target_views = {view for views in targets_of.values() for view in views}
    predictor = list(online.predictors.parameters())
    encoder = [p for name, p in online.named_parameters() if p.requires_grad and not name.startswith("predictors.")]
    encoder_sum: dict[int, Tensor] = {}
    predictor_sum: dict[int, Tensor] = {}
    predicted: dict[int, list[Tensor]] = defaultdict(list)
    embedded: list[Tensor] = []
    count = 0
    for views in batches:
        count += 1
        z = {v: online(views[v]) for v in online_views(recipe.views)}  # [B, out] each
        with torch.no_grad():
            aims = {t: z[t].detach() if target is None else target(views[t]) for t in target_views}
        embedded.append(z[min(z)].detach())
        for v, embedding in z.items():
            prediction = online.predictors(embedding.unsqueeze(0), (slots[v],)).squeeze(0)  # [B, out]
            predicted[v].append(prediction.detach())
            value = torch.stack([loss(prediction, aims[t]) for t in targets_of[v]]).mean()
            gradients = torch.autograd.grad(value, [*encoder, *predictor], materialize_grads=True)
            _add(encoder_sum, v, gradients[: len(encoder)])
            _add(predictor_sum, v, gradients[len(encoder) :])
    first = {spec.task: v for v, spec in reversed(list(enumerate(recipe.views))) if spec.task is not None}
    embedding = torch.cat(embedded)  # [N, out]
    return ViewDiagnostics(
        encoder={v: total / count for v, total in encoder_sum.items()},
        predictor={v: total / count for v, total in predictor_sum.items()},
        prediction_rank={task: float(effective_rank(torch.cat(predicted[v]))) for task, v in sorted(first.items())},
        embedding_rank=float(effective_rank(embedding)),
        embedding_std=float(embedding_std(embedding)),
    )


def gradient_cosines(
    gradients: Mapping[int, Tensor], views: Sequence[ViewSpec], *, tasks_share: bool = True
) -> dict[str, float]:
    """Mean cosine between the gradients of two views of one task ("global") and of two tasks ("global/local").

    Pairs within a task show what noise and differing crops leave; how far pairs across tasks fall short of it is
    conflict.

    Args:
        gradients: [P] by view.
        views: of the recipe.
        tasks_share: whether two tasks share these weights, unlike predictors per task.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for one, two in itertools.combinations(sorted(gradients), 2):
        tasks = dict.fromkeys((views[one].task or "", views[two].task or ""))
        if len(tasks) == 1 or tasks_share:
            a, b = gradients[one].double(), gradients[two].double()
            found["/".join(tasks)].append(float(a @ b / (a.norm() * b.norm())))
    return {name: mean(values) for name, values in found.items()}


def _add(sums: dict[int, Tensor], view: int, gradients: Iterable[Tensor]) -> None:
    flat = torch.cat([gradient.detach().float().flatten() for gradient in gradients])
    sums[view] = sums[view] + flat if view in sums else flat
