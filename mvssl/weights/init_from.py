"""Start a run from weights of another one: weights only, no optimiser, no position."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mvssl.config.recipe import Head, Recipe
from mvssl.models.encoder import OnlineNetwork, TargetNetwork
from mvssl.models.heads import MLP, PredictorBank
from mvssl.runs import checkpoint
from mvssl.runs.folder import RunFolder
from mvssl.weights.backbone_file import load_backbone
from mvssl.weights.formats import Found, find_networks, from_torchvision
from mvssl.weights.load import load_tensors, read_metadata, read_weights
from pipelines.runtime import InputError

_log = logging.getLogger("mvssl")


def init_from(online: OnlineNetwork, target: TargetNetwork | None, recipe: Recipe, path: Path | None) -> None:
    """Load the weights at `path` into the online network and make the target a copy of it; None does nothing.

    Args:
        online: freshly built online network.
        target: its target network, if there is one.
        recipe: their recipe.
        path: an exported backbone (.safetensors: the backbone only), a run folder or one of its checkpoints (backbone,
            projector and predictors), or a file of the paper's release, MoCo, SimSiam, DINO, timm or torchvision (the
            backbone, and what of its heads has the recipe's shape; the log says which).

    Raises:
        InputError: it is missing, damaged, of an unknown layout, or does not fit the recipe's networks.
    """
    if path is None:
        return
    if not path.exists():
        raise InputError(f"init_from is {str(path)!r} but there is nothing of that name: give a run folder or a file.")
    if path.is_dir():
        _from_run(online, path)
    elif "architecture" in read_metadata(path):
        load_backbone(online.backbone, path, architecture=recipe.backbone.name)
    else:
        found = find_networks(read_weights(path), where=str(path))
        _log.info("Weights of %s: %s", path, _from_others(online, recipe, found, str(path)))
    if target is not None:
        target.copy_from(online)


def _from_run(online: OnlineNetwork, path: Path) -> None:
    last = RunFolder(path).last
    saved = checkpoint.load(last if last.exists() else path)
    try:
        online.load_state_dict(saved.state["step"]["online"])
    except RuntimeError as error:
        raise InputError(
            f"init_from is {str(path)!r}, whose networks do not fit the recipe "
            f"({str(error).splitlines()[-1].strip()}): use the same backbone and heads, or give an exported "
            "backbone."
        ) from error


def _from_others(online: OnlineNetwork, recipe: Recipe, found: Found, where: str) -> str:
    """Take over another project's networks; says which."""
    name = recipe.backbone.name
    if found.layout == "MoCo v3" and name.startswith("vit_small"):
        raise InputError(
            f"init_from is {where!r}, MoCo v3's small vision transformer, which has 12 attention heads where {name} "
            "has 6: its weights would compute something else. Take its ResNet-50 or its base vision transformer."
        )
    load_tensors(online.backbone, from_torchvision(found.backbone), name, where)
    taken = [f"{found.network} backbone of {found.layout}"]
    if _take(online.projector, found.projector):
        taken.append("projector")
    if _take_predictors(online.predictors, recipe.predictor, found.predictor):
        taken.append("predictors")
    left = [what for what in ("projector", "predictors") if what not in taken]
    return f"taken over are {', '.join(taken)}" + (f"; {' and '.join(left)} begin anew." if left else ".")


def _take(mlp: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Load a head if it fits; a last layer without bias (MoCo v3's) is one whose bias is 0."""
    wanted = mlp.state_dict()
    absent = {
        name: torch.zeros_like(value)
        for name, value in wanted.items()
        if name not in tensors and name.endswith((".bias", "num_batches_tracked"))
    }
    ours = absent | dict(tensors)
    if not tensors or {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in wanted.items()}:
        return False
    mlp.load_state_dict(ours)
    return True


def _take_predictors(bank: PredictorBank, head: Head, tensors: Mapping[str, Tensor]) -> bool:
    """Load the predictors, one for each task or one for all, if they are the recipe's."""
    mlps = {}
    for task in bank.tasks:
        prefix = "" if bank.tasks == ("shared",) else f"{task}."
        mlps[task] = MLP(bank.in_features, head)
        if not _take(mlps[task], {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}):
            return False
    bank.load_state_dict(PredictorBank.from_mlps(mlps).state_dict())
    return True
