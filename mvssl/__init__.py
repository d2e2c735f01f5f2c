"""mvssl: self-supervised pre-training with many views per image.

``mvssl.train(mvssl.recipes.byol_resnet50_200ep(), data="...", out="...")`` trains; README documents the rest.
"""

from __future__ import annotations

from mvssl import recipes
from mvssl.monitor.failure import Diverged
from mvssl.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.recipe_file import load_recipe
from mvssl.training.result import Interrupted, TrainResult
from mvssl.training.trainer import train
from pipelines.errors import InputError

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
