"""Starts a backbone from weights that timm knows by a name, or that a folder or a hub's repository holds."""

from __future__ import annotations

import difflib
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
from huggingface_hub import constants
from timm.models import get_pretrained_cfg, list_pretrained, load_model_config_from_hf
from torch import nn

from mvssl.config.recipe import Backbone, Recipe
from mvssl.models.backbones import check_architecture, input_normalisation
from mvssl.weights.read import load_tensors, read_folder
from pipelines.runtime import InputError, shown
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, LARGEST_SIDE

_FOLDER, _HUB = "local-dir:", "hf-hub:"
_HUB_PREFIXES = (_HUB, "hf_hub:")
_WEIGHTS = "model.safetensors"
_REACH_SECONDS = 5.0
_MOST_CLASSES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights that `Backbone.pretrained` names.

    Attributes:
        source: name for `timm.create_model`.
        architecture: timm's name of it, without a tag.
        where: where the weights lie, in words.
        file: the file that holds them, in words.
        mean: of the images that they expect, for each channel of RGB.
        std: their standard deviation.
        side: of the images that they were trained on last, in pixels.
        classes: of their classifier; 0 without one.
        licence: of the weights; "" if it is not stated.
    """

    source: str
    architecture: str
    where: str
    file: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    side: int
    classes: int
    licence: str


def resolve_pretrained(recipe: Recipe, *, init_from: Path | None = None) -> Recipe:
    """The recipe, with the normalisation that its pretrained weights expect unless it states one.

    Raises:
        InputError: there are no such weights, or `init_from` names others.
    """
    backbone = recipe.backbone
    if backbone.pretrained is None:
        return recipe
    if init_from is not None:
        raise InputError(
            f"Backbone.pretrained is {shown(backbone.pretrained)} and init_from is {str(init_from)!r}, but a run "
            "starts from one of them: leave --backbone.pretrained or --init-from out.",
            field="Backbone.pretrained",
        )
    found = find_pretrained(backbone)
    normalisation = (backbone.mean or found.mean, backbone.std or found.std)
    if normalisation == (IMAGENET_MEAN, IMAGENET_STD):
        return recipe
    return replace(recipe, backbone=replace(backbone, mean=normalisation[0], std=normalisation[1]))


def load_pretrained(backbone: nn.Module, config: Backbone) -> str:
    """Load the weights that `config.pretrained` names into a backbone; returns a line on what was loaded.

    timm downloads, caches and converts them: position embeddings are resized, a first convolution for another number of
    channels is adapted.

    Raises:
        InputError: there are no such weights, they cannot be fetched, or they do not fit.
    """
    found = find_pretrained(config)
    options: dict[str, Any] = {"num_classes": found.classes, "in_chans": 3}  # with its own classifier timm is strict
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if size is not None:
        options["img_size"] = tuple(size)
    with _explained(config, found):
        donor: Any = timm.create_model(found.source, pretrained=True, **options)
        donor.reset_classifier(0)
    tensors = donor.state_dict()
    load_tensors(backbone, tensors, found.architecture, found.source)
    _check_same_features(backbone, donor, config, found, size=size[-1] if size else found.side)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    licence = f", licence {found.licence}" if found.licence else ""
    mean, std = config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD
    return (
        f"initial weights: {found.source.removeprefix(_FOLDER)} ({found.where}{licence}): backbone ({len(tensors)} "
        f"tensors, {numbers / 1e6:.1f} M numbers), for images normalised by mean {_triple(mean)} and std "
        f"{_triple(std)}; freshly initialised: projector, predictors"
    )


@torch.no_grad()
def _check_same_features(
    backbone: nn.Module, donor: nn.Module, config: Backbone, found: Pretrained, *, size: int
) -> None:
    """Raise InputError unless a backbone gives the features of the model that its weights come from."""
    device, training = next(backbone.parameters()).device, backbone.training
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    own = [
        torch.tensor(values).view(3, 1, 1) for values in input_normalisation(backbone) or (IMAGENET_MEAN, IMAGENET_STD)
    ]
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = donor.eval()((images - own[0]) / own[1])
    found_features = backbone.eval()(((images - mean) / std).to(device)).cpu()
    backbone.train(training)
    if found_features.shape != expected.shape or (found_features - expected).abs().max() > 0.02 * expected.abs().max():
        raise InputError(
            f"Backbone.pretrained is {shown(config.pretrained)}, a model built with other arguments than timm's "
            f"{found.architecture}, in which its weights give other features: choose weights of timm's own one.",
            field="Backbone.pretrained",
        )


def named_architecture(text: str) -> str | None:
    """The architecture that `Backbone.pretrained` names beside its weights; None for a tag alone."""
    if text.startswith(_HUB_PREFIXES):  # timm's own repositories are named so; config.json of others says it
        name = text.rpartition("/")[2].partition(".")[0]
        if timm.is_model(name):
            return name
        with suppress(Exception):  # of several HTTP libraries; the run itself reports it
            return str(load_model_config_from_hf(text.partition(":")[2])[1]).partition(".")[0]
        return None
    if text.startswith(_FOLDER) or Path(text).is_dir():
        path = Path(text.removeprefix(_FOLDER)).expanduser()
        with suppress(InputError):  # the run itself reports it
            architecture: str = read_folder(path, field="Backbone.pretrained")[1]["architecture"]
            return architecture.partition(".")[0]
        return None
    name = text.partition(".")[0]
    return name if ("." in text and "/" not in text) or timm.is_model(name) else None


def find_pretrained(config: Backbone) -> Pretrained:
    """The weights that `config.pretrained` names, without loading them; of a hub's repository, config.json is fetched.

    Raises:
        InputError: there are none of that name, or they belong to another architecture.
    """
    text = str(config.pretrained)
    architecture = config.name.partition(".")[0]
    if text.startswith(_FOLDER) or Path(text).is_dir():
        path = Path(text.removeprefix(_FOLDER)).expanduser()
        if not path.is_dir():
            raise InputError(
                f"Backbone.pretrained is {shown(text)} but must be a folder with config.json and {_WEIGHTS}, and there "
                f"is no folder {path}: correct the path.",
                field="Backbone.pretrained",
            )
        weights, content = read_folder(path, field="Backbone.pretrained")
        return _stated(config, f"{_FOLDER}{path}", content, where=f"folder {path}", file=str(weights))
    if text.startswith(_HUB_PREFIXES):
        repository = text.partition(":")[2]
        where, file = f"hub {repository}", f"config.json of {repository}"
        with _explained_missing(config, file):
            prepared, name, arguments = load_model_config_from_hf(repository)
        content = {"architecture": name, "pretrained_cfg": prepared, "model_args": arguments}
        return _stated(config, _HUB + repository, content, where=where, file=f"{_WEIGHTS} of {repository}")
    check_architecture(architecture)
    full = _full_name(config)
    cfg = get_pretrained_cfg(full)
    hub = cfg.hf_hub_id if cfg is not None else None
    file = f"{cfg.hf_hub_filename or _WEIGHTS} of {hub}" if cfg is not None and hub else getattr(cfg, "url", "")
    stated = {} if cfg is None else asdict(cfg)
    content = {"architecture": architecture, "pretrained_cfg": stated}
    return _stated(config, full, content, where=f"hub {hub}" if hub else "timm", file=file)


def _full_name(config: Backbone) -> str:
    """timm's name with a tag, such as vit_small_patch14_dinov2.lvd142m, of weights that exist."""
    text, (architecture, _, tag) = str(config.pretrained), config.name.partition(".")
    if "/" in text or ":" in text:
        raise InputError(
            f"Backbone.pretrained is {shown(text)} but must be a tag, timm's full name, {_HUB}USER/NAME or "
            f"{_FOLDER}FOLDER: write which of these it is, or correct the path.",
            field="Backbone.pretrained",
        )
    if text == "true":
        name = f"{architecture}.{tag}" if tag else architecture
    elif "." in text or timm.is_model(text):
        name = text
    else:
        name = f"{architecture}.{text}"
    _check_same_architecture(config, name.partition(".")[0])
    known = list_pretrained()
    if "." not in name:
        default = get_pretrained_cfg(name)
        name = f"{name}.{default.tag}" if default is not None and default.tag else name
    if name in known:
        return name
    own = [one.partition(".")[2] for one in known if one.partition(".")[0] == architecture]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    if own:
        closest = difflib.get_close_matches(text.rpartition(".")[2], own, n=1, cutoff=0.4)
        others = [] if closest or "." in text else _weights_like(text, known)
        remedy = f"did you mean {closest[0]}? " if closest else "choose one of these: "
        allowed, remedy = f"one of {architecture}'s tags", remedy + ", ".join(own)
        if others:
            allowed += f" ({', '.join(own)}) or the name of other weights"
            remedy = f"did you mean {', '.join(others)}?"
    elif "." in text and near:
        allowed, remedy = "the name of weights in timm", f"did you mean {', '.join(near)}?"
    else:
        allowed = f"left out for {architecture}, of which timm has no weights"
        remedy = "leave it out, or choose a backbone that has some, such as resnet50 or vit_small_patch14_dinov2."
    raise InputError(
        f"Backbone.pretrained is {shown(text)} but must be {allowed}: {remedy}", field="Backbone.pretrained"
    )


def _weights_like(text: str, known: Sequence[str]) -> list[str]:
    """Up to three names of weights whose architecture is spelt nearly so, or has the text in it, or whose tag it is."""
    models = {name.partition(".")[0]: name for name in reversed(known)}
    near = difflib.get_close_matches(text, models, n=3, cutoff=0.8)
    holding = sorted((name for name in known if text in name), key=lambda name: (len(name), name))
    return [models[name] for name in near] or holding[:3]


def _check_same_architecture(config: Backbone, architecture: str) -> None:
    ours = config.name.partition(".")[0]
    if architecture != ours:
        raise InputError(
            f"Backbone.pretrained is {shown(config.pretrained)}, weights of {shown(architecture)}, but must be those "
            f"of the backbone {ours}: set --backbone.name {architecture}, or name a tag of {ours}.",
            field="Backbone.pretrained",
        )


def _stated(config: Backbone, source: str, content: Mapping[str, Any], *, where: str, file: str) -> Pretrained:
    """The weights that a folder, a repository or timm describes by timm's config.json."""
    architecture = content["architecture"].partition(".")[0]
    _check_same_architecture(config, architecture)
    check_architecture(architecture)
    stated = content.get("pretrained_cfg") or content
    try:
        mean, std = (_channels(stated.get(name) or default) for name, default in _NORMAL.items())
        classes = int(content.get("num_classes", stated.get("num_classes", 1000)))
        side = int((stated.get("input_size") or (3, 224, 224))[-1])
        if not (all(value > 0 for value in std) and 0 < side <= LARGEST_SIDE and 0 <= classes <= _MOST_CLASSES):
            raise ValueError(f"std is {std}, input_size is {stated.get('input_size')}, num_classes is {classes}")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Backbone.pretrained is {shown(config.pretrained)}, whose config.json does not say how images are "
            f"prepared ({error}): correct its mean, std and input_size, three numbers each.",
            field="Backbone.pretrained",
        ) from error
    licence = str(stated.get("license") or "")
    return Pretrained(
        source=source,
        architecture=architecture,
        where=where,
        file=file,
        mean=mean,
        std=std,
        side=side,
        classes=classes,
        licence=licence,
    )


_NORMAL = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def _channels(values: Any) -> tuple[float, float, float]:
    """Three numbers; one stands for all channels."""
    numbers = tuple(map(float, values))
    red, green, blue = numbers * 3 if len(numbers) == 1 else numbers
    return red, green, blue


def _triple(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


@contextmanager
def _explained(config: Backbone, found: Pretrained) -> Iterator[None]:
    """Turn what timm raises while it loads weights into one sentence."""
    if found.source.startswith(_FOLDER):
        try:
            yield
        except Exception as error:  # damaged files raise many types
            raise InputError(
                f"Backbone.pretrained is {shown(config.pretrained)} but {found.file} cannot be loaded into "
                f"{found.architecture} ({_reason(error)}): copy the folder again, or name another one.",
                field="Backbone.pretrained",
            ) from error
        return
    with _explained_missing(config, found.file):
        yield


@contextmanager
def _explained_missing(config: Backbone, file: str) -> Iterator[None]:
    """Turn what timm and the hub's client raise if a file cannot be fetched into one sentence."""
    try:
        with _offline_if_unreachable():
            yield
    except Exception as error:  # of requests, httpx, urllib, huggingface_hub, safetensors: no common base
        if "state_dict" in str(error) or "safetensors" in type(error).__module__ + type(error).__name__.lower():
            raise InputError(  # it is there
                f"Backbone.pretrained is {shown(config.pretrained)} but {file} cannot be loaded ({_reason(error)}): "
                f"delete it from the cache ({constants.HF_HUB_CACHE}), so that it is fetched again, or name others.",
                field="Backbone.pretrained",
            ) from error
        raise InputError(
            f"Backbone.pretrained is {shown(config.pretrained)} but {file} is not in the cache "
            f"({constants.HF_HUB_CACHE}) and cannot be fetched ({_reason(error)}): where there is a network, download "
            f"the repository and give its folder (--backbone.pretrained {_FOLDER}FOLDER), or copy that machine's cache "
            "here and set HF_HUB_OFFLINE=1.",
            field="Backbone.pretrained",
        ) from error


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Use the cache alone if the hub's address answers nothing; its client would try for minutes, file by file."""
    address = urlsplit(constants.ENDPOINT)
    offline = constants.HF_HUB_OFFLINE
    if not offline and not getproxies():  # behind a proxy the address itself need not answer
        try:
            port = address.port or (80 if address.scheme == "http" else 443)
            socket.create_connection((address.hostname or "", port), timeout=_REACH_SECONDS).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    first = lines[0].rstrip(".:") if lines else ""
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
