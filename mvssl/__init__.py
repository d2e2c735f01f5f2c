"""mvssl: self-supervised pre-training with many views per image.

``mvssl.train(mvssl.recipes.byol_resnet50_200ep(), data="...", out="...")`` trains; README documents the rest.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import mvssl.own_pipelines  # noqa: F401  (before anything imports `pipelines`)

if TYPE_CHECKING:
    from mvssl import recipes
    from mvssl.config.options import RunOptions
    from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
    from mvssl.evaluate.frozen import FrozenBackbone, load_backbone
    from mvssl.monitor.collapse import Collapsed
    from mvssl.recipes.files import load_recipe
    from mvssl.training.callbacks import CallbackFailed, StopTraining, TrainState
    from mvssl.training.monitor import Diverged
    from mvssl.training.run import TrainResult, train
    from mvssl.training.shutdown import Interrupted
    from pipelines.runtime import InputError

__all__ = [
    "Backbone",
    "CallbackFailed",
    "Collapsed",
    "Diverged",
    "Evaluation",
    "FrozenBackbone",
    "Head",
    "InputError",
    "Interrupted",
    "Optimizer",
    "Recipe",
    "RunOptions",
    "StopTraining",
    "TrainResult",
    "TrainState",
    "load_backbone",
    "load_recipe",
    "recipes",
    "train",
]

_MODULES = {
    **dict.fromkeys(("Backbone", "Evaluation", "Head", "Optimizer", "Recipe"), "mvssl.config.recipe"),
    **dict.fromkeys(("FrozenBackbone", "load_backbone"), "mvssl.evaluate.frozen"),
    "Collapsed": "mvssl.monitor.collapse",
    "Diverged": "mvssl.training.monitor",
    "InputError": "pipelines.runtime",
    "Interrupted": "mvssl.training.shutdown",
    "RunOptions": "mvssl.config.options",
    **dict.fromkeys(("CallbackFailed", "StopTraining", "TrainState"), "mvssl.training.callbacks"),
    "TrainResult": "mvssl.training.run",
    "load_recipe": "mvssl.recipes.files",
    "train": "mvssl.training.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a package of mvssl, when it is first used: mvssl-convert needs none of them."""
    if name == "__version__":
        from pipelines.runtime import installed_version

        return installed_version()
    if name in _MODULES:
        import mvssl.cli  # noqa: F401  (threads of OpenMP soon sleep, if torch is not loaded yet)

        globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return globals()[name]
    if not name.startswith("_") and importlib.util.find_spec(f"mvssl.{name}") is not None:
        return importlib.import_module(f"mvssl.{name}")
    raise AttributeError(f"module 'mvssl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
