"""One pass of some views through the online network, from images to the loss: what is compiled, and what DDP wraps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvssl.methods import Method
from mvssl.networks.encoder import OnlineNetwork
from mvssl.networks.passes import Group, Plan
from mvssl.recipe import Recipe
from mvssl.training.compiled.compiling import Compiler
from mvssl.training.pairs import predictor_slots, target_views, task_pairs


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
