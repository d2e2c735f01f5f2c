"""Lower bounds on the traffic and launches of a convolutional network's step, from its layers alone.

The counting rules are those of `schedule`: a convolution reads its input and writes its output; its backward reads the
gradient and the input once and writes the input's gradient. A training BatchNorm takes two passes forward (statistics;
normalise, with ReLU and residual for free) and two backward (sums; dx). Heads, weights and the optimiser are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mvssl.config.recipe import Recipe
from mvssl.models.backbones import build_backbone, is_convolutional
from mvssl.models.view_batching import ViewGroup, make_plan
from pipelines.views.spec import ViewSpec


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Least traffic and launches of a step.

    Attributes:
        megabytes_per_image: by part (target forward, online forward, backward).
        launches: by part.
    """

    megabytes_per_image: dict[str, float]
    launches: dict[str, int]

    @property
    def total(self) -> dict[str, float]:
        """The sums over the parts."""
        return {
            "megabytes_per_image": sum(self.megabytes_per_image.values()),
            "launches": sum(self.launches.values()),
        }


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """Layers of one forward of one image; `inputs`, `outputs` and `normalised` count elements."""

    convolutions: int
    norms: int
    inputs: int
    outputs: int
    normalised: int


def floor(
    recipe: Recipe,
    *,
    step_mode: Literal["joint", "per-view"] = "joint",
    group_views: bool = True,
    target_network: bool = True,
) -> Floor | None:
    """The floor of a recipe's step; None for backbones that are not convolutions with BatchNorm.

    Args:
        recipe: with backbone, views, precision and accumulate.
        step_mode: as of `Execution`.
        group_views: whether views of one size are batched.
        target_network: whether a separate target network is needed.
    """
    backbone = build_backbone(recipe.backbone)
    if not is_convolutional(backbone) or not any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        return None
    size = 4 if recipe.precision == "fp32" else 2
    plan = make_plan(recipe.views, joint=step_mode == "joint", grouped=group_views, targets_first=not target_network)
    layers = {view.size: _layers(backbone, view.size) for view in recipe.views}
    targets = _passes(recipe.views, plan.targets) if target_network else []
    online = [each for group in plan.online for each in _passes(recipe.views, group)]
    megabytes: dict[str, float] = {}
    launches: dict[str, int] = {}
    for name, passes, backward in (
        ("target forward", targets, False),
        ("online forward", online, False),
        ("backward", online, True),
    ):
        moved = count = 0
        for pixels, views in passes:
            own = layers[pixels]
            convolution = own.outputs + (2 if backward else 1) * own.inputs
            norm = (5 if backward else 3) * own.normalised
            moved += views * size * (convolution + norm)
            count += own.convolutions + 2 * own.norms
        megabytes[name] = moved / 1e6
        launches[name] = count * recipe.accumulate
    return Floor(megabytes_per_image=megabytes, launches=launches)


def _passes(views: Sequence[ViewSpec], group: ViewGroup) -> list[tuple[int, int]]:
    """Size and number of the views of each forward."""
    return [(views[group.views[batch.positions[0]]].size, len(batch.positions)) for batch in group.batches]


def _layers(backbone: nn.Module, pixels: int) -> _Layers:
    """Count the layers that an image of this size passes through."""
    shadow = copy.deepcopy(backbone).to("meta").eval()
    found: list[tuple[bool, int, int]] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((isinstance(module, _BatchNorm), inputs[0].numel(), output.numel()))

    for module in shadow.modules():
        if isinstance(module, (nn.Conv2d, _BatchNorm)):
            module.register_forward_hook(look)
    with torch.no_grad():
        shadow(torch.zeros(1, 3, pixels, pixels, device="meta"))
    return _Layers(
        convolutions=sum(not norm for norm, *_ in found),
        norms=sum(norm for norm, *_ in found),
        inputs=sum(taken for norm, taken, _ in found if not norm),
        outputs=sum(given for norm, _, given in found if not norm),
        normalised=sum(given for norm, _, given in found if norm),
    )
