"""The two networks of a recipe, built from its seed."""

from __future__ import annotations

import torch
from torch import nn

from mvssl.networks.encoder import OnlineNetwork
from mvssl.networks.target import TargetNetwork
from mvssl.recipe import Recipe


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
