"""The networks: an encoder (backbone and projector), and the online network that adds the predictors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mvssl.backbones import build_backbone, feature_width
from mvssl.heads import MLP, PredictorBank
from mvssl.recipe import Recipe
from pipelines.views.spec import tasks


class Encoder(nn.Module):
    """Backbone and projector. One forward per view: every BatchNorm normalises over one view (SPEC section 3).

    Attributes:
        backbone: [B, 3, S, S] -> [B, D].
        projector: [B, D] -> [B, out].
        feature_width: D.
    """

    def __init__(self, recipe: Recipe, *, drop_path: bool) -> None:
        super().__init__()
        self.backbone = build_backbone(recipe.backbone, drop_path=drop_path)
        sizes = {view.size for view in recipe.views} | {recipe.evaluation.crop}
        self.feature_width = feature_width(self.backbone, sizes, name=recipe.backbone.name)
        self.projector = MLP(self.feature_width, recipe.projector)

    def forward(self, view: Tensor) -> Tensor:
        """Embed one view: [B, 3, S, S] -> [B, out]."""
        embedding: Tensor = self.projector(self.backbone(view))
        return embedding


class OnlineNetwork(Encoder):
    """The network that is trained: an encoder and one predictor per task (or one shared by all).

    Attributes:
        predictors: the bank; its keys are the tasks, or "shared" alone.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, drop_path=True)
        # Drawn last, so that the encoder's initial weights do not depend on how many predictors there are.
        keys = tasks(recipe.views) if recipe.predictors == "per-view" else ("shared",)
        self.predictors = PredictorBank(keys, recipe.projector.out, recipe.predictor)


class OnlinePass(nn.Module):
    """One pass of some views through an online network, as one module: what DistributedDataParallel wraps."""

    def __init__(self, online: OnlineNetwork, encode: Callable[[Tensor], Tensor]) -> None:
        """`encode` calls the network's encoder (compiled or not) on one view."""
        super().__init__()
        self.online = online
        self._encode = encode

    def forward(self, views: Sequence[Tensor], slots: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Embed V views [B, 3, S, S], each in a forward of its own, and predict through the slots of their tasks.

        Returns:
            Embeddings and predictions, [V, B, out] each.
        """
        z = torch.stack([self._encode(view) for view in views])  # [V, B, out]
        return z, self.online.predictors(z, slots)
