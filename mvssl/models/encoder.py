"""The networks: an encoder (backbone and projector), and the online network that adds the predictors.

The two networks of a recipe, built from its seed.

The target network: an encoder without gradient that follows the online network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvssl.config.recipe import Recipe
from mvssl.models.backbones import build_backbone, feature_width
from mvssl.models.batchnorm import Pass, group_batchnorms, ungroupable
from mvssl.models.foreach_ops import lerp_
from mvssl.models.fused.resnet import fuse_resnets
from mvssl.models.heads import MLP, PredictorBank
from mvssl.models.view_batching import Group
from pipelines.views.spec import tasks


class Encoder(nn.Module):
    """Backbone and projector. Every BatchNorm normalises over the images of one view (PAPER.md section 3).

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


class TargetNetwork(Encoder):
    """Backbone and projector that no gradient reaches, without stochastic depth. Stays in train mode (PAPER.md section
    3): its BatchNorm normalises with the statistics of each view, and its buffers follow its own forwards.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, drop_path=False)
        self.requires_grad_(False)

    def copy_from(self, online: nn.Module) -> None:
        """Take over the parameters and buffers of the online network's backbone and projector."""
        names = self.state_dict().keys()
        self.load_state_dict({name: value for name, value in online.state_dict().items() if name in names})


class Follow:
    """Moves a target network behind its online network."""

    def __init__(self, target: nn.Module, online: nn.Module) -> None:
        parameters, buffers = dict(online.named_parameters()), dict(online.named_buffers())
        self._parameters: list[Tensor] = [p for _, p in target.named_parameters()]
        self._online_parameters: list[Tensor] = [parameters[name] for name, _ in target.named_parameters()]
        self._buffers = [b for _, b in target.named_buffers()]
        self._online_buffers = [buffers[name] for name, _ in target.named_buffers()]

    def average(self, pace: Tensor) -> None:
        """The moving average of PAPER.md section 5: parameters only; to be called before the forward of the step.

        target = decay * target + (1 - decay) * online; `pace` is 1 - decay, a scalar on the networks' device: near the
        end of a run a decay would not hold it in float32.
        """
        lerp_(self._parameters, self._online_parameters, pace)

    @torch.no_grad()
    def copy(self) -> None:
        """Make the target the online network of this step, parameters and buffers (PAPER.md section 3, SimSiam)."""
        torch._foreach_copy_(self._parameters, self._online_parameters)
        if self._buffers:  # networks without BatchNorm have none, which torch refuses
            torch._foreach_copy_(self._buffers, self._online_buffers)


def build_networks(recipe: Recipe) -> tuple[OnlineNetwork, TargetNetwork]:
    """The online network and its target, equal at first; float32, on the CPU, in train mode.

    The encoder's initial weights are a function of `recipe.seed` and of the shapes of backbone and projector alone;
    torch's global generator is left as it was.

    Raises:
        InputError: the backbone is unknown or does not fit the view sizes.
    """
    # Only the CPU's generator: torch.manual_seed would also reseed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        online = OnlineNetwork(recipe)
        target = TargetNetwork(recipe)
    target.copy_from(online)
    return online, target


def initial_backbone(recipe: Recipe) -> nn.Module:
    """The backbone with the weights that a run of this recipe begins with, on the CPU, in train mode.

    Raises:
        InputError: the backbone is unknown or does not fit the view sizes.
    """
    return build_networks(recipe)[0].backbone
