"""How the views of a step pull at the networks: their gradients compared, and how much their predictions differ.

With one predictor for all views, the tasks share its weights: where their gradients point in other directions than
those of two views of one task do, they are in each other's way (the cosine of gradients as a sign of conflict: Yu et
al., Gradient surgery for multi-task learning, arXiv 2001.06782).

Label-free signs of collapse, from a batch of embeddings.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from mvssl.config.recipe import Recipe
from mvssl.methods import get_method
from mvssl.models.encoder import OnlineNetwork, TargetNetwork
from mvssl.models.view_batching import online_views, predictor_slots, task_pairs
from pipelines.views.spec import ViewSpec

MIN_STD = 0.1
MIN_RANK = 2.0


def embedding_std(embedding: Tensor) -> Tensor:
    """Mean standard deviation over the batch of each dimension of the l2-normalised embeddings, times sqrt(D).

    1 for directions spread evenly over the sphere, 0 when all embeddings point the same way (Chen and He,
    arXiv 2011.10566, section 4.1); about sqrt(1 - c) for a mean cosine c between different images.

    Args:
        embedding: [B, D] with B of 2 or more.

    Returns:
        A scalar on the device, float32 or better.
    """
    unit = F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)  # [B, D]
    return unit.std(dim=0).mean() * math.sqrt(unit.shape[1])


def effective_rank(embedding: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of [B, D] (Roy and Vetterli 2007; RankMe, arXiv 2210.02885).

    Between 1 (all embeddings on one line through 0) and min(B, D). Not centred, so that a constant counts as 1.

    Returns:
        A scalar on the device, float32 or better.
    """
    values = torch.linalg.svdvals(embedding.to(torch.promote_types(embedding.dtype, torch.float32)))  # [min(B, D)]
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank


def collapse_warning(*, std: float, rank: float, batch_size: int, dim: int) -> str | None:
    """Say that the embeddings have collapsed, or None.

    Thresholds: `std` below 0.1 means a mean cosine above 0.99 between different images (see `embedding_std`): the
    representation hardly depends on the image. `rank` below 2 means that one direction carries nearly everything. Both
    are far from healthy values (a trained network has a std of 0.5 and more and a rank of tens), so a warning is rarely
    false, except in the very first steps. With fewer than 8 images or dimensions the rank says nothing and is ignored.

    Args:
        std: from `embedding_std`.
        rank: from `effective_rank`.
        batch_size, dim: shape of the embeddings.
    """
    if math.isfinite(std) and std < MIN_STD:
        return (
            f"The embeddings are collapsing: their standard deviation is {std:.3f} of the even spread (below "
            f"{MIN_STD}), so nearly all images get the same embedding: lower the learning rate or lengthen the warm-up."
        )
    if min(batch_size, dim) >= 8 and math.isfinite(rank) and rank < MIN_RANK:
        return (
            f"The embeddings are collapsing: their effective rank is {rank:.2f} of {min(batch_size, dim)} (below "
            f"{MIN_RANK:g}), so they lie along one direction: lower the learning rate or lengthen the warm-up."
        )
    return None


@dataclass(frozen=True, kw_only=True)
class ViewSignals:
    """What some batches say of networks.

    Attributes:
        encoder: gradients of backbone and projector, float32 [P] by view: of the view's own loss, the mean over its
            targets, averaged over the batches.
        predictor: those of the bank of predictors likewise, of all slots.
        prediction_rank: effective rank of the predictions of each task's first view, by task.
        embedding_rank: effective rank of the online embeddings of the first view.
        embedding_std: their spread (`mvssl.monitor.signals.embedding_std`).
    """

    encoder: dict[int, Tensor]
    predictor: dict[int, Tensor]
    prediction_rank: dict[str, float]
    embedding_rank: float
    embedding_std: float


def view_signals(
    recipe: Recipe, online: OnlineNetwork, target: TargetNetwork | None, batches: Iterable[Sequence[Tensor]]
) -> ViewSignals:
    """Take the gradients of every view apart.

    Nothing is updated but BatchNorms' running statistics, as in any forward in train mode: give copies.

    Args:
        recipe: of the networks.
        online: on the views' device, in train mode.
        target: likewise; None where online embeddings are the targets.
        batches: views as `TrainStep` takes them, [B, 3, S, S] each.
    """
    loss = get_method(recipe.method).make_loss(recipe)
    slots = predictor_slots(recipe.views, recipe.predictors)
    met_by: dict[int, list[int]] = defaultdict(list)  # targets of each online view
    for task in task_pairs(recipe.views, recipe.task_weights):
        for view, other in task.pairs:
            met_by[view].append(other)
    predictor = list(online.predictors.parameters())
    shared = [p for name, p in online.named_parameters() if p.requires_grad and not name.startswith("predictors.")]
    encoder_sum: dict[int, Tensor] = {}
    predictor_sum: dict[int, Tensor] = {}
    predicted: dict[int, list[Tensor]] = defaultdict(list)
    embedded: list[Tensor] = []
    count = 0
    for views in batches:
        count += 1
        z = {v: online(views[v]) for v in online_views(recipe.views)}  # [B, out] each
        with torch.no_grad():
            aims = {
                t: z[t].detach() if target is None else target(views[t])
                for t in {t for ts in met_by.values() for t in ts}
            }
        embedded.append(z[min(z)].detach())
        for v, embedding in z.items():
            prediction = online.predictors(embedding.unsqueeze(0), (slots[v],)).squeeze(0)  # [B, out]
            predicted[v].append(prediction.detach())
            value = torch.stack([loss(prediction, aims[t]) for t in met_by[v]]).mean()
            gradients = torch.autograd.grad(value, [*shared, *predictor], materialize_grads=True)
            _add(encoder_sum, v, gradients[: len(shared)])
            _add(predictor_sum, v, gradients[len(shared) :])
    first = {spec.task: v for v, spec in reversed(list(enumerate(recipe.views))) if spec.task is not None}
    embedding = torch.cat(embedded)  # [N, out]
    return ViewSignals(
        encoder={v: total / count for v, total in encoder_sum.items()},
        predictor={v: total / count for v, total in predictor_sum.items()},
        prediction_rank={task: float(effective_rank(torch.cat(predicted[v]))) for task, v in sorted(first.items())},
        embedding_rank=float(effective_rank(embedding)),
        embedding_std=float(embedding_std(embedding)),
    )


def agreement(
    gradients: Mapping[int, Tensor], views: Sequence[ViewSpec], *, tasks_share: bool = True
) -> dict[str, float]:
    """Mean cosine between the gradients of two views: of one task ("global"), or of two ("global/local").

    A pair of views of one task says what noise and the images leave; conflict is what a pair of two tasks falls short
    of it.

    Args:
        gradients: by view, [P] each.
        views: of the recipe.
        tasks_share: whether two tasks share weights at all, unlike predictors of their own.
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
