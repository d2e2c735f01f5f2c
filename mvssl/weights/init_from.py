"""Initialises a run from earlier weights: networks only, no optimiser state and no position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mvssl.config.recipe import Head, Recipe
from mvssl.models.encoder import OnlineNetwork, TargetNetwork, predictor_tasks
from mvssl.models.heads import PredictorBank
from mvssl.runs import checkpoint
from mvssl.runs.folder import RunFolder
from mvssl.weights.formats import FoundNetwork, find_network, from_torchvision, guess_architecture
from mvssl.weights.pretrained import load_pretrained, resolve_pretrained
from mvssl.weights.read import is_timm_folder, load_tensors, read_folder, read_metadata, read_weights
from pipelines.runtime import InputError

_OPTION = "--backbone.name"  # names another architecture
_SHARED = "shared"  # the only slot of a bank with one predictor


def init_from(online: OnlineNetwork, target: TargetNetwork | None, recipe: Recipe, path: Path | None) -> str | None:
    """Load weights into freshly built networks and copy the online network to the target.

    Without `path` these are the weights that `recipe.backbone.pretrained` names; without either nothing is done.

    Args:
        online: the online network.
        target: its target network, if there is one.
        recipe: their recipe.
        path: an exported backbone or a folder in timm's form (loads the backbone); a run folder or one of its
            checkpoints (backbone, projector and predictors); or a file of the reference implementation, MoCo,
            SimSiam, DINO, timm or torchvision (the backbone, and heads that
            have the recipe's shape).

    Returns:
        One line on what was taken, what was left and what keeps its initial weights, and why; None without a path.

    Raises:
        InputError: the weights are missing, damaged, of an unknown format, or do not fit the recipe's networks.
    """
    if path is None and recipe.backbone.pretrained is None:
        return None
    if path is None:
        loaded = load_pretrained(online.backbone, recipe.backbone)
        if target is not None:
            target.copy_from(online)
        return loaded
    resolve_pretrained(recipe, init_from=path)  # refuses both
    if not path.exists():
        raise InputError(f"init_from is {str(path)!r} but there is nothing of that name: give a run folder or a file.")
    is_run = path.is_dir() and not is_timm_folder(path)
    outcome = _from_run(online, path) if is_run else _from_file(online, recipe, path)
    if target is not None:
        target.copy_from(online)
        outcome.left.append("the target network (a copy of the online one is used)")
    return f"initial weights from {path}{outcome}"


@dataclass
class _Outcome:
    """What was done with each part of the networks, in words; `fresh` has reasons by part."""

    origin: str = ""
    taken: list[str] = field(default_factory=list)
    fresh: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        fresh = [f"{part} ({reason})" for part, reason in self.fresh.items()]
        parts = {"loaded": self.taken, "freshly initialised": fresh, "not taken": self.left}
        said = "; ".join(f"{word}: {', '.join(items)}" for word, items in parts.items() if items)
        return f" ({self.origin}): {said}" if self.origin else f": {said}"


def _backbone(tensors: Mapping[str, Tensor]) -> str:
    return f"backbone ({len(tensors)} tensors)"


def _from_run(online: OnlineNetwork, path: Path) -> _Outcome:
    last = RunFolder(path).newest
    saved = checkpoint.load(last if last.exists() else path)
    state: dict[str, Tensor] = saved.network("online") or {}
    outcome = _Outcome(origin=f"online network, step {saved.meta['step']}")
    outcome.taken += [_backbone({k: v for k, v in state.items() if k.startswith("backbone.")}), "projector"]
    given, bank = predictor_tasks(saved.recipe()), online.predictors
    sources = _sources(given, bank.tasks)
    # The file's slots are in the order of its own tasks.
    for name, initial in bank.state_dict().items():
        stacked = state.get(f"predictors.{name}")
        if stacked is not None and stacked.shape[1:] == initial.shape[1:] and len(stacked) == len(given):
            rows = [
                initial[slot].cpu() if source is None else stacked[given.index(source)]
                for slot, source in enumerate(sources.values())
            ]
            state[f"predictors.{name}"] = torch.stack(rows)
    try:
        online.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"init_from is {str(path)!r}, whose networks do not fit the recipe "
            f"({str(error).splitlines()[-1].strip()}): use the same backbone and heads, or give an exported "
            "backbone."
        ) from error
    _describe_predictors(outcome, given, sources, {})
    return outcome


def _from_file(online: OnlineNetwork, recipe: Recipe, path: Path) -> _Outcome:
    name = recipe.backbone.name
    if path.is_dir():
        path, config = read_folder(path, field="init_from")
        architecture, heads = config["architecture"], config.get("model_args", {}).get("num_heads")
    else:
        metadata = read_metadata(path)
        architecture, heads = metadata.get("architecture"), metadata.get("num_heads")
    weights = read_weights(path)
    if heads is not None:
        raise InputError(
            f"init_from is {str(path)!r}, a {architecture} with {heads} attention heads, unlike timm's {name}, so its "
            "weights do not fit: use weights of timm's own architecture."
        )
    if architecture is None:
        found = find_network(weights, where=str(path), names=lambda: tuple(online.backbone.state_dict()))
        return _from_found(online, recipe, found, str(path))
    if architecture != name:
        raise InputError(
            f"{path} holds a {architecture} but the recipe's backbone is {name}: set --backbone.name {architecture}."
        )
    load_tensors(online.backbone, weights, name, str(path), option=_OPTION)
    reason = "the file holds a backbone only"
    return _Outcome(taken=[_backbone(weights)], fresh={"projector": reason, "predictors": reason})


def _from_found(online: OnlineNetwork, recipe: Recipe, found: FoundNetwork, where: str) -> _Outcome:
    """Load another project's backbone, and its heads where they fit."""
    name = recipe.backbone.name
    if found.heads(name) is not None:
        raise InputError(
            f"init_from is {where!r}, MoCo v3's small vision transformer, which has 12 attention heads where {name} "
            "has 6, so its weights do not fit: use MoCo v3's ResNet-50 or base vision transformer."
        )
    tensors, wanted = from_torchvision(found.backbone), online.backbone.state_dict()
    other = guess_architecture(tensors)
    option = _OPTION if other in (None, name) else f"{_OPTION} {other}"
    load_tensors(online.backbone, tensors, name, where, option=option)
    outcome = _Outcome(origin=f"{found.format}, {found.network} network")
    outcome.taken.append(_backbone({name: tensor for name, tensor in tensors.items() if name in wanted}))
    outcome.left += sorted({f"classifier {name.split('.')[0]}" for name in tensors if name not in wanted})
    reason = _load_mlp(online.projector, found.projector)
    if reason is None:
        outcome.taken.append("projector")
    else:
        outcome.fresh["projector"] = reason
    _load_predictors(outcome, online.predictors, recipe.predictor, found.predictor)
    return outcome


def _load_mlp(mlp: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """Load a head if it fits; the reason if not. Missing biases are 0: MoCo v3's last layer has none."""
    if not tensors:
        return "the file has none"
    wanted = mlp.state_dict()
    zeros = {
        name: torch.zeros_like(value)
        for name, value in wanted.items()
        if name not in tensors and name.endswith((".bias", "num_batches_tracked"))
    }
    given = zeros | dict(tensors)
    if {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in wanted.items()}:
        mlp.load_state_dict(given)
        return None
    theirs, ours = _widths(tensors), _widths(wanted)
    if theirs != ours:
        return f"it is {theirs} wide in the file and {ours} in the recipe"
    other = sorted(set(given) ^ set(wanted)) or [k for k in wanted if given[k].shape != wanted[k].shape]
    return f"its norms or biases differ, e.g. {other[0]}"


def _widths(tensors: Mapping[str, Tensor]) -> str:
    """Widths of an MLP from input to output, such as 2048-4096-256."""
    layers = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    return "-".join(str(width) for width in [*(layer.shape[1] for layer in layers[:1]), *map(len, layers)])


def _load_predictors(outcome: _Outcome, bank: PredictorBank, head: Head, tensors: Mapping[str, Tensor]) -> None:
    """Load the predictors that fit: those of the bank's view types, or a single one into every slot."""
    if not tensors:
        outcome.fresh["predictors"] = "the file has none"
        return
    single = all(name.split(".")[0].isdigit() for name in tensors)
    given = (_SHARED,) if single else tuple(dict.fromkeys(name.split(".")[0] for name in tensors))
    mlps, sources, reasons = bank.to_mlps(), _sources(given, bank.tasks), {}
    for task, source in sources.items():
        if source is not None:
            prefix = "" if single else f"{source}."
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            reason = _load_mlp(mlps[task], own)
            if reason is not None:
                reasons[task] = reason
    bank.load_state_dict(PredictorBank.from_mlps(mlps).state_dict())
    _describe_predictors(outcome, given, sources, reasons)


def _sources(given: tuple[str, ...], wanted: tuple[str, ...]) -> dict[str, str | None]:
    """Which of the given predictors each slot takes: the one of its view type, or the only one if either is shared."""
    if len(given) == 1 and _SHARED in (*given, *wanted):
        return dict.fromkeys(wanted, given[0])
    return {task: task if task in given else None for task in wanted}


def _describe_predictors(
    outcome: _Outcome, given: tuple[str, ...], sources: Mapping[str, str | None], reasons: Mapping[str, str]
) -> None:
    """Add to the outcome what became of the predictors; `reasons` are those of view types whose predictor misfits."""
    loaded = [task for task, source in sources.items() if source is not None and task not in reasons]
    if loaded and given == (_SHARED,) and loaded != [_SHARED]:
        outcome.taken.append(f"its only predictor, for each of {', '.join(loaded)}")
    elif loaded == [_SHARED] and given != (_SHARED,):
        outcome.taken.append(f"its predictor of {given[0]}, as the shared one")
    elif loaded:
        outcome.taken.append("shared predictor" if loaded == [_SHARED] else f"predictors of {', '.join(loaded)}")
    for task in sources:
        if task not in loaded:
            part = "shared predictor" if task == _SHARED else f"predictor of {task}"
            kind = "only a shared one" if given == (_SHARED,) else f"those of {', '.join(given)}"
            outcome.fresh[part] = reasons.get(task, f"the file has {kind}")
    unused = [task for task in given if task not in sources.values()]
    if unused:
        outcome.left.append(f"predictors of {', '.join(unused)} (the recipe has none)")
