"""Start a run from weights of another one: weights only, no optimiser, no position."""

from __future__ import annotations

from pathlib import Path

from mvssl import checkpoint
from mvssl.export import load_backbone
from mvssl.recipe import Recipe
from mvssl.run_folder import RunFolder
from mvssl.step import TrainStep
from pipelines.errors import InputError


def init_from(step: TrainStep, recipe: Recipe, path: Path | None) -> None:
    """Load the weights at `path` into the online network and make the target a copy of it; None does nothing.

    Args:
        step: freshly built training step.
        recipe: its recipe.
        path: an exported backbone (.safetensors: the backbone only), or a run folder or one of its checkpoints
            (backbone, projector and predictors).

    Raises:
        InputError: it is missing, damaged, or does not fit the recipe's networks.
    """
    if path is None:
        return
    if not path.exists():
        raise InputError(f"init_from is {str(path)!r} but there is nothing of that name: give a run folder or a file.")
    if path.suffix == ".safetensors":
        load_backbone(step.online.backbone, path, architecture=recipe.backbone.name)
    else:
        last = RunFolder(path).last
        saved = checkpoint.load(last if last.exists() else path)
        try:
            step.online.load_state_dict(saved.state["step"]["online"])
        except RuntimeError as error:
            raise InputError(
                f"init_from is {str(path)!r}, whose networks do not fit the recipe "
                f"({str(error).splitlines()[-1].strip()}): use the same backbone and heads, or give an exported "
                "backbone."
            ) from error
    if step.target is not None:
        step.target.copy_from(step.online)
