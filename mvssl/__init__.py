"""mvssl: self-supervised pre-training with many views per image.

``mvssl.train(mvssl.recipes.byol_resnet50_200ep(), data="...", out="...")`` trains; README documents the rest.
"""

from __future__ import annotations

from mvssl import recipes
from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.recipes.files import load_recipe
from mvssl.training.monitor import Diverged
from mvssl.training.run import TrainResult, train
from mvssl.training.shutdown import Interrupted
from pipelines.runtime import InputError

__all__ = [
    "Backbone",
    "Diverged",
    "Evaluation",
    "Head",
    "InputError",
    "Interrupted",
    "Optimizer",
    "Recipe",
    "TrainResult",
    "load_recipe",
    "recipes",
    "train",
]
