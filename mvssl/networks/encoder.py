"""The networks: an encoder (backbone and projector), and the online network that adds the predictors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvssl.networks.backbones import build_backbone, feature_width
from mvssl.networks.fused_resnet import fuse_resnets
from mvssl.networks.grouped_batchnorm import Pass, group_batchnorms, ungroupable
from mvssl.networks.heads import MLP, PredictorBank
from mvssl.networks.passes import Group
from mvssl.recipe import Recipe
from pipelines.views.spec import tasks


class Encoder(nn.Module):
    """Backbone and projector. Every BatchNorm normalises over the images of one view (SPEC section 3).

    Attributes:
        backbone: [N, 3, S, S] -> [N, D].
        projector: [N, D] -> [N, out].
        feature_width: D.
        ungroupable: the layer that forbids several views in one batch, which `forward` must not get then; or None.
    """

    def __init__(self, recipe: Recipe, *, drop_path: bool) -> None:
        super().__init__()
        self.backbone = build_backbone(recipe.backbone, drop_path=drop_path)
        sizes = {view.size for view in recipe.views} | {recipe.evaluation.crop}
        self.feature_width = feature_width(self.backbone, sizes, name=recipe.backbone.name)
        self.projector = MLP(self.feature_width, recipe.projector)
        self.ungroupable = ungroupable(self)
        self._pass = Pass()
        group_batchnorms(self, self._pass)
        fuse_resnets(self)

    def forward(self, batch: Tensor, places: tuple[int, ...] = (0,), of: int = 1, first: bool = True) -> Tensor:
        """Embed one view [B, 3, S, S], or V views of one size as one batch [V * B, 3, S, S].

        Args:
            batch: the views one behind the other.
            places: place of each among the views whose order running statistics follow.
            of: how many those are in all; 1 for a view on its own.
            first: whether this is the first forward for them.

        Returns:
            [V * B, out].
        """
        self._pass.set(places, of, first=first)
        embedding: Tensor = self.projector(self.backbone(batch))
        self._pass.reset()
        return embedding

    def embed(self, batches: list[Tensor], group: Group) -> Tensor:
        """Embed the views of a group.

        Args:
            batches: [V * B, 3, S, S] for each block of the group.
            group: the views.

        Returns:
            [V, B, out], in the order of the group's views.
        """
        by_place: dict[int, Tensor] = {}
        for number, (block, batch) in enumerate(zip(group.blocks, batches, strict=True)):
            alone = group.of == 1
            z: Tensor = self(batch) if alone else self(batch, block.places, group.of, number == 0)  # [V * B, out]
            embedded = torch.unflatten(z, 0, (len(block.places), -1))
            if block.places == tuple(range(len(group.views))):
                return embedded
            by_place |= dict(zip(block.places, embedded.unbind(), strict=True))
        return torch.stack([by_place[place] for place in range(len(group.views))])


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
