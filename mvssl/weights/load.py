"""Loads a frozen backbone from a run or a file of weights, without running code from the file."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import timm
import torch
from torch import Tensor, nn

from mvssl.config.evaluation import BackboneSource as BackboneSource
from mvssl.config.evaluation import Network
from mvssl.config.recipe import Backbone, Evaluation, Recipe
from mvssl.models.backbones import build_backbone, normalisation
from mvssl.models.encoder import initial_backbone
from mvssl.runs import checkpoint
from mvssl.runs.checkpoint import BEST, LAST
from mvssl.runs.folder import RunFolder
from mvssl.weights.backbone_file import metadata_normalisation
from mvssl.weights.formats import find_network, from_torchvision, guess_architecture
from mvssl.weights.pretrained import load_pretrained
from mvssl.weights.read import load_tensors, read_folder, read_metadata, read_weights
from pipelines.runtime import InputError
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, Interpolation


@dataclass(frozen=True, kw_only=True)
class LoadedBackbone:
    """A backbone and what is known of it.

    Attributes:
        name: short name for tables and files, such as online or untrained.
        backbone: ImageNet-normalised images [B, 3, S, S] to features [B, D]; in eval mode.
        architecture: timm's name.
        evaluation: resize, crop and kNN settings.
        recipe: of the run, if there is one.
        folder: of the run, if there is one.
        about: origin of the weights, for people.
        network: online, target or untrained; of a file with a single network, "only".
        digest: hash of all parameters and buffers, 16 hexadecimal digits.
    """

    name: str
    backbone: nn.Module
    architecture: str
    evaluation: Evaluation
    recipe: Recipe | None = None
    folder: RunFolder | None = None
    about: str = ""
    network: str = "untrained"
    digest: str = ""


def load_backbone(source: BackboneSource) -> LoadedBackbone:
    """Build a backbone on the CPU and load its weights.

    Raises:
        InputError: the run or file is missing, damaged or of an unknown format, or the weights fit no architecture.
    """
    folder = None if source.run is None else RunFolder(source.run)
    recipe = None if folder is None else folder.recipe()
    if source.weights is not None:
        loaded = _from_file(source, source.weights, recipe)
    elif folder is None or recipe is None:
        arch = source.arch or ""
        loaded = LoadedBackbone(
            name="untrained", backbone=_random_backbone(arch), architecture=arch, evaluation=Evaluation()
        )
    elif source.untrained:
        loaded = LoadedBackbone(
            name="untrained",
            backbone=_initial(recipe),
            architecture=recipe.backbone.name,
            evaluation=recipe.evaluation,
        )
    else:
        loaded = _from_run(folder, recipe, source.network or "online", source.checkpoint)
    base = loaded.evaluation if recipe is None else recipe.evaluation
    resize = source.resize or (max(base.resize, source.crop) if source.crop else base.resize)
    return replace(
        loaded,
        backbone=loaded.backbone.eval(),
        evaluation=replace(
            base,
            resize=resize,
            crop=source.crop or min(base.crop, resize),
            interpolation=source.interpolation or base.interpolation,
        ),
        recipe=recipe,
        folder=folder,
        digest=_digest(loaded.architecture, loaded.backbone),
    )


def _digest(architecture: str, backbone: nn.Module) -> str:
    digest = hashlib.sha256(architecture.encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _initial(recipe: Recipe) -> nn.Module:
    """The backbone that a run of this recipe starts from, for ImageNet-normalised images."""
    config = recipe.backbone
    backbone = initial_backbone(replace(recipe, backbone=replace(config, mean=None, std=None)))
    if config.pretrained is not None:
        load_pretrained(backbone, config)
    return _renormalised(backbone, normalisation(config))


def _from_run(folder: RunFolder, recipe: Recipe, network: Network, which: str) -> LoadedBackbone:
    """The backbone of a checkpoint; of the last one also from the exported file, if no checkpoint is left."""
    backbone = build_backbone(replace(recipe.backbone, mean=None, std=None), drop_path=False)
    exported = network == "online" and which == LAST
    if exported and not any(folder.checkpoints.glob("step-*")) and folder.backbone.exists():
        tensors, where = dict(read_weights(folder.backbone)), folder.backbone
        about = str(folder.backbone)
    else:
        saved = checkpoint.load(folder.newest if which == LAST else checkpoint.find(folder.checkpoints, which))
        weights = saved.network(network)
        if weights is None:
            raise InputError(
                f"network is 'target' but the run in {folder.path} has no separate target network ({recipe.method} "
                "uses the online network's embeddings as targets): leave --network out."
            )
        prefix = "backbone."
        tensors = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        where, about = saved.path, f"{network} network, step {saved.meta['step']}"
    load_tensors(backbone, tensors, recipe.backbone.name, str(where))
    return LoadedBackbone(
        name=network if which == LAST else f"{network}-{which if which == BEST else where.name}",
        backbone=_renormalised(backbone, normalisation(recipe.backbone)),
        architecture=recipe.backbone.name,
        evaluation=recipe.evaluation,
        about=about,
        network=network,
    )


# Names that MoCo, SimSiam and DINO give to architectures, as timm's.
_FOREIGN_NAMES = {
    "deit_tiny": "vit_tiny_patch16_224",
    "vit_tiny": "vit_tiny_patch16_224",
    "deit_small": "vit_small_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
}


def _from_file(source: BackboneSource, path: Path, recipe: Recipe | None) -> LoadedBackbone:
    if path.is_dir():
        return _from_folder(source, path)
    metadata = read_metadata(path)
    own = metadata.get("architecture", "")  # in a file of another project it may be anything
    name = source.arch or (own if timm.is_model(own.split(".")[0]) else None)
    if not name and recipe is not None:
        name = recipe.backbone.name
    found = find_network(
        read_weights(path),
        network=source.network,
        where=str(path),
        names=partial(tensor_names, name) if name else None,
    )
    tensors = from_torchvision(found.backbone)
    if not name:  # the tensors come before the file's own name, which differs between projects
        stated = _FOREIGN_NAMES.get(found.architecture or "", found.architecture)
        name = guess_architecture(tensors) or (stated if stated and timm.is_model(stated) else None)
    if name is None:
        raise InputError(
            f"{path} ({found.format}) does not tell its architecture: name it as timm does, for example "
            "--arch resnet50."
        )
    heads = found.heads(name)
    is_transformer = "cls_token" in tensors
    if is_transformer and re.fullmatch("[1-9][0-9]{0,2}", metadata.get("num_heads", "")):
        heads = int(metadata["num_heads"])
    as_release = found.format == "the reference implementation" or metadata.get("pos_embed") == "release"
    pos_embed: Literal["timm", "release"] = "release" if as_release and is_transformer else "timm"
    backbone = _random_backbone(name, heads=heads, pos_embed=pos_embed)
    load_tensors(backbone, tensors, name, str(path))
    evaluation = Evaluation()
    config = timm.models.get_pretrained_cfg(name) if "." in name else None
    if theirs := metadata_normalisation(metadata):
        backbone = _renormalised(backbone, theirs)
    elif config is not None:
        crop = config.input_size[-1]
        evaluation = Evaluation(resize=max(crop, int(crop / config.crop_pct)), crop=crop)
        if (tuple(config.mean), tuple(config.std)) != (IMAGENET_MEAN, IMAGENET_STD):
            backbone = _Renormalised(backbone, config.mean, config.std)
    about = f"{path.name}: {found.format}, {found.network} network"
    return LoadedBackbone(
        name=path.stem,
        backbone=backbone,
        architecture=name,
        evaluation=evaluation,
        about=about,
        network=found.network if found.choice else "only",
    )


def _from_folder(source: BackboneSource, path: Path) -> LoadedBackbone:
    """The backbone of a folder in timm's form (config.json, model.safetensors), with its own preparation of images."""
    weights, config = read_folder(path)
    name, arguments, prepared = (
        config["architecture"],
        config.get("model_args", {}),
        config.get("pretrained_cfg", config),
    )
    unknown = sorted(arguments.keys() - {"dynamic_img_size", "num_heads", "img_size", "num_classes"})
    if unknown or source.arch not in (None, name):
        problem = f"has the model arguments {', '.join(unknown)}" if unknown else f"is of {name}, not of {source.arch}"
        raise InputError(
            f"weights is {str(path)!r}, whose config.json {problem}: load it with timm and export it there."
        )
    found = find_network(
        read_weights(weights), network=source.network, where=str(weights), names=lambda: tensor_names(name)
    )
    tensors = from_torchvision(found.backbone)
    backbone = _random_backbone(name, heads=arguments.get("num_heads"))
    load_tensors(backbone, tensors, name, str(weights))
    try:
        crop, share = int(prepared["input_size"][-1]), float(prepared.get("crop_pct") or 0.875)
        mean, std = (tuple(map(float, prepared.get(key, default))) for key, default in _IMAGENET.items())
        interpolation: Interpolation = "bilinear" if prepared.get("interpolation") == "bilinear" else "bicubic"
        evaluation = Evaluation(resize=max(crop, round(crop / share)), crop=crop, interpolation=interpolation)
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(f"mean is {mean} and std {std}")
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise InputError(
            f"weights is {str(path)!r}, whose config.json does not say how images are prepared "
            f"({type(error).__name__}: {error}): give its weights file and --arch, --resize and --crop."
        ) from error
    return LoadedBackbone(
        name=path.resolve().name,
        backbone=backbone if (mean, std) == (IMAGENET_MEAN, IMAGENET_STD) else _Renormalised(backbone, mean, std),
        architecture=name,
        evaluation=evaluation,
        about=f"{path.resolve().name}: timm's folder",
        network="only",
    )


_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def own_normalisation(backbone: nn.Module) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """A backbone for images that are normalised by the mean and standard deviation given with it (RGB, of 0 to 1)."""
    if isinstance(backbone, _Renormalised):
        return backbone.backbone, backbone.mean, backbone.std
    return backbone, IMAGENET_MEAN, IMAGENET_STD


def tensor_names(name: str) -> tuple[str, ...]:
    """The names of an architecture's parameters and buffers."""
    with torch.device("meta"):
        return tuple(build_backbone(Backbone(name=name), drop_path=False).state_dict())


def _random_backbone(
    name: str, *, heads: int | None = None, pos_embed: Literal["timm", "release"] = "timm"
) -> nn.Module:
    """A backbone with the same random weights each time; `heads` overrides timm's number of attention heads."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if heads is None:
            return build_backbone(Backbone(name=name, pos_embed=pos_embed), drop_path=False)
        backbone: nn.Module = timm.create_model(name, num_classes=0, dynamic_img_size=True, num_heads=heads)
        return backbone


def _renormalised(backbone: nn.Module, own: tuple[tuple[float, ...], tuple[float, ...]] | None) -> nn.Module:
    """The backbone for ImageNet-normalised images, if its own normalisation is another one."""
    return backbone if own in (None, (IMAGENET_MEAN, IMAGENET_STD)) else _Renormalised(backbone, *own)


class _Renormalised(nn.Module):
    """A backbone for another normalisation, which takes ImageNet-normalised images all the same."""

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone, self.mean, self.std = backbone, mean, std
        ours, theirs = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]), torch.tensor([mean, std])
        self.register_buffer("scale", (ours[1] / theirs[1]).view(3, 1, 1))
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, D]."""
        features: Tensor = self.backbone(images * self.scale + self.shift)
        return features
