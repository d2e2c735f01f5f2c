"""Initialises a run from earlier weights: networks only, no optimiser state and no position."""

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
from mvssl.weights.formats import FoundNetwork, find_network, from_torchvision
from mvssl.weights.load import load_tensors, read_metadata, read_weights
from pipelines.runtime import InputError

_log = logging.getLogger("mvssl")


def init_from(online: OnlineNetwork, target: TargetNetwork | None, recipe: Recipe, path: Path | None) -> None:
    """Load weights into freshly built networks and copy the online network to the target; `path` None does nothing.

    Args:
        online: the online network.
        target: its target network, if there is one.
        recipe: their recipe.
        path: an exported backbone (loads the backbone); a run folder or one of its checkpoints (backbone, projector
            and predictors); or a file of the reference implementation, MoCo, SimSiam, DINO, timm or torchvision (the
            backbone, and heads that have the recipe's shape; the log says which).

    Raises:
        InputError: the weights are missing, damaged, of an unknown format, or do not fit the recipe's networks.
    """
    if path is None:
        return
    if not path.exists():
        raise InputError(f"init_from is {str(path)!r} but there is nothing of that name: give a run folder or a file.")
    if path.is_dir():
        _from_run(online, path)
    else:
        _from_file(online, recipe, path)
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


def _from_file(online: OnlineNetwork, recipe: Recipe, path: Path) -> None:
    name, weights = recipe.backbone.name, read_weights(path)
    architecture = read_metadata(path).get("architecture")
    if architecture is None:
        found = find_network(weights, where=str(path))
        _log.info("Weights of %s: %s", path, _load_found(online, recipe, found, str(path)))
    elif architecture == name:
        load_tensors(online.backbone, weights, name, str(path))
    else:
        raise InputError(
            f"{path} holds a {architecture} but the recipe's backbone is {name}: set --backbone.name {architecture}."
        )


def _load_found(online: OnlineNetwork, recipe: Recipe, found: FoundNetwork, where: str) -> str:
    """Load another project's backbone, and its heads where they fit; says which."""
    name = recipe.backbone.name
    if found.format == "MoCo v3" and name.startswith("vit_small"):
        raise InputError(
            f"init_from is {where!r}, MoCo v3's small vision transformer, which has 12 attention heads where {name} "
            "has 6, so its weights do not fit: use MoCo v3's ResNet-50 or base vision transformer."
        )
    load_tensors(online.backbone, from_torchvision(found.backbone), name, where)
    fits = {
        "projector": _load_mlp(online.projector, found.projector),
        "predictors": _load_predictors(online.predictors, recipe.predictor, found.predictor),
    }
    loaded = [f"{found.network} backbone of {found.format}", *(head for head, fit in fits.items() if fit)]
    fresh = [head for head, fit in fits.items() if not fit]
    return f"loaded: {', '.join(loaded)}" + (f"; freshly initialised: {', '.join(fresh)}" if fresh else "")


def _load_mlp(mlp: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Load a head if it fits. Missing biases are 0: MoCo v3's last layer has none."""
    wanted = mlp.state_dict()
    zeros = {
        name: torch.zeros_like(value)
        for name, value in wanted.items()
        if name not in tensors and name.endswith((".bias", "num_batches_tracked"))
    }
    given = zeros | dict(tensors)
    if not tensors or {k: v.shape for k, v in given.items()} != {k: v.shape for k, v in wanted.items()}:
        return False
    mlp.load_state_dict(given)
    return True


def _load_predictors(bank: PredictorBank, head: Head, tensors: Mapping[str, Tensor]) -> bool:
    """Load the predictors (one per task, or a shared one) if all fit."""
    mlps = {}
    for task in bank.tasks:
        prefix = "" if bank.tasks == ("shared",) else f"{task}."
        mlps[task] = MLP(bank.in_features, head)
        if not _load_mlp(mlps[task], {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}):
            return False
    bank.load_state_dict(PredictorBank.from_mlps(mlps).state_dict())
    return True
