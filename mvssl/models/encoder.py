"""The two networks: encoders (backbone and projector), of which the online one also has a predictor per task.

Shapes: V views of B images, S pixels wide, D backbone features, `out` features after projector and predictor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvssl.config.recipe import Recipe
from mvssl.models.backbones import build_backbone, feature_width
from mvssl.models.batchnorm import ForwardViews, find_unbatchable, use_view_batchnorms
from mvssl.models.foreach_ops import lerp_
from mvssl.models.fused.resnet import fuse_resnets
from mvssl.models.heads import MLP, PredictorBank
from mvssl.models.view_batching import ViewGroup
from pipelines.views.spec import tasks


class Encoder(nn.Module):
    """Backbone and projector. Every BatchNorm normalises over the images of one view (PAPER.md section 3).

    Attributes:
        backbone: [N, 3, S, S] -> [N, D].
        projector: [N, D] -> [N, out].
        feature_width: D.
        unbatchable: the layer that prevents batching several views, which must then be embedded one by one; or None.
    """

    def __init__(self, recipe: Recipe, *, drop_path: bool) -> None:
        super().__init__()
        self.backbone = build_backbone(recipe.backbone, drop_path=drop_path)
        sizes = {view.size for view in recipe.views} | {recipe.evaluation.crop}
        self.feature_width = feature_width(self.backbone, sizes, name=recipe.backbone.name)
        self.projector = MLP(self.feature_width, recipe.projector)
        self.unbatchable = find_unbatchable(self)
        self._forward_views = ForwardViews()
        use_view_batchnorms(self, self._forward_views)
        fuse_resnets(self)

    def embed(self, images: list[Tensor], group: ViewGroup) -> Tensor:
        """Embed a group of views, with one forward per size batch.

        Args:
            images: [V * B, 3, S, S] for each size batch of the group, V being the views of that size.
            group: the views.

        Returns:
            [V, B, out], all views in the order of the group.
        """
        by_position: dict[int, Tensor] = {}
        for number, (batch, views) in enumerate(zip(group.batches, images, strict=True)):
            if group.norm_views == 1:
                z: Tensor = self(views)  # [B, out]
            else:
                z = self(views, batch.positions, group.norm_views, number == 0)  # [V * B, out]
            embedded = torch.unflatten(z, 0, (len(batch.positions), -1))  # [V, B, out]
            if batch.positions == tuple(range(len(group.views))):
                return embedded  # all views have one size and are in order
            by_position |= dict(zip(batch.positions, embedded.unbind(), strict=True))  # [B, out] each
        return torch.stack([by_position[position] for position in range(len(group.views))])

    def forward(self, batch: Tensor, positions: tuple[int, ...] = (0,), total: int = 1, first: bool = True) -> Tensor:
        """Embed one view [B, 3, S, S], or V views of one size as one batch [V * B, 3, S, S].

        Args:
            batch: the views one after another.
            positions: of each view in the group, whose order the running statistics follow.
            total: number of views in the group; 1 for a single view.
            first: whether this is the group's first forward.

        Returns:
            [V * B, out].
        """
        self._forward_views.set(positions, total, first=first)  # read by every BatchNorm
        embedding: Tensor = self.projector(self.backbone(batch))  # [V * B, 3, S, S] -> [V * B, D] -> [V * B, out]
        self._forward_views.reset()
        return embedding


class OnlineNetwork(Encoder):
    """The trained network: an encoder and one predictor per task (or one shared by all).

    Attributes:
        predictors: the predictor bank, with a slot per task or a single one, "shared".
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, drop_path=True)
        # Initialised last, so that the encoder's weights do not depend on the number of predictors.
        self.predictors = PredictorBank(predictor_tasks(recipe), recipe.projector.out, recipe.predictor)


def predictor_tasks(recipe: Recipe) -> tuple[str, ...]:
    """The tasks of a recipe's predictor bank, in the order of its slots."""
    return tasks(recipe.views) if recipe.predictors == "per-view" else ("shared",)


class TargetNetwork(Encoder):
    """Backbone and projector without gradient and without stochastic depth, always in train mode (PAPER.md section 3).

    Its BatchNorm normalises with the statistics of each view, and its buffers follow its own forwards.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, drop_path=False)
        self.requires_grad_(False)

    def copy_from(self, online: nn.Module) -> None:
        """Copy parameters and buffers of the online network's backbone and projector."""
        names = self.state_dict().keys()
        self.load_state_dict({name: value for name, value in online.state_dict().items() if name in names})


class TargetUpdate:
    """Updates a target network from its online network, by EMA or copy, in a few launches for all tensors."""

    def __init__(self, target: nn.Module, online: nn.Module) -> None:
        parameters, buffers = dict(online.named_parameters()), dict(online.named_buffers())
        self._parameters: list[Tensor] = [p for _, p in target.named_parameters()]
        self._online_parameters: list[Tensor] = [parameters[name] for name, _ in target.named_parameters()]
        self._buffers = [b for _, b in target.named_buffers()]
        self._online_buffers = [buffers[name] for name, _ in target.named_buffers()]

    def average(self, one_minus_tau: Tensor) -> None:
        """EMA of the parameters, before the forward of a step: target = tau * target + (1 - tau) * online.

        `one_minus_tau` is a scalar on the networks' device. Near the end of a run float32 could not represent tau
        (PAPER.md section 5).
        """
        lerp_(self._parameters, self._online_parameters, one_minus_tau)

    @torch.no_grad()
    def copy(self) -> None:
        """Copy parameters and buffers of the online network (PAPER.md section 3, SimSiam)."""
        torch._foreach_copy_(self._parameters, self._online_parameters)
        if self._buffers:  # torch refuses the empty list of networks without BatchNorm
            torch._foreach_copy_(self._buffers, self._online_buffers)


def build_networks(recipe: Recipe) -> tuple[OnlineNetwork, TargetNetwork]:
    """Online and target network with equal weights; float32, on the CPU, in train mode.

    The encoder's initial weights depend on `recipe.seed` and on the shapes of backbone and projector alone; torch's
    global generator is left unchanged.

    Raises:
        InputError: the backbone is unknown or does not fit the view sizes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would also reseed every GPU
        online = OnlineNetwork(recipe)
        target = TargetNetwork(recipe)
    target.copy_from(online)
    return online, target


def initial_backbone(recipe: Recipe) -> nn.Module:
    """The backbone with the weights that a run of this recipe starts from; on the CPU, in train mode."""
    return build_networks(recipe)[0].backbone
