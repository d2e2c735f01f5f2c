"""The backbone that is measured, exported or asked for features, from wherever its weights are.

Reading files of weights without running what they hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mvssl.config.recipe import Backbone, Evaluation, Recipe
from mvssl.models.backbones import build_backbone
from mvssl.models.encoder import initial_backbone
from mvssl.runs import checkpoint
from mvssl.runs.folder import RunFolder
from mvssl.weights.formats import Network, find_networks, from_torchvision, guess_architecture
from pipelines.runtime import InputError
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD

# Plain values that training scripts keep beside their weights (DINO its arguments, many a numpy number); building
# them runs no code of the file.
_SCALAR: Any = type(np.float64(0)).__reduce__(np.float64(0))[0]  # numpy's own builder of numbers, under two names
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


def read_weights(path: Path) -> Mapping[str, Any]:
    """What a file of weights holds: names and tensors, on the CPU, or mappings of such.

    Args:
        path: .safetensors, or what torch.save wrote (any other ending). Metadata of a .safetensors file is left out.

    Raises:
        InputError: it is missing, damaged, no file of weights, or holds objects other than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(
            f"weights is {str(path)!r} but there is no file of that name: give a .safetensors file or a checkpoint "
            "written by torch.save."
        )
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} {_refusal(str(error))}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} cannot be read as a file of weights ({reason}): copy or download it again; it must be a "
            ".safetensors file or written by torch.save."
        ) from error
    if not isinstance(held, Mapping):
        raise InputError(
            f"{path} holds a {type(held).__name__} but must hold a mapping of names to tensors: save the network's "
            "state_dict()."
        )
    return held


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; {} of any other file, or if it has none."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError, json.JSONDecodeError):
        return {}  # reading its tensors says why


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as a .safetensors file ({error}): copy or download it again."
        ) from error


def _refusal(said: str) -> str:
    """Why torch refused a file, in a sentence: what it holds besides tensors, or that it is none of torch's."""
    marker = "GLOBAL "
    if marker in said:
        name = said.split(marker, 1)[1].split(" ", 1)[0]
        return (
            f"holds {name}, which is code and is not run here: load it where you trust it and save only the network's "
            "state_dict()."
        )
    return (
        "cannot be read as a file of weights (it holds no tensors that torch can load safely): give a .safetensors "
        "file or a state_dict() written by torch.save."
    )


# What MoCo, SimSiam and DINO call their networks, as timm does.
_THEIR_NAMES = {
    "deit_tiny": "vit_tiny_patch16_224",
    "vit_tiny": "vit_tiny_patch16_224",
    "deit_small": "vit_small_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
}
_MOCO_V3_HEADS = 12  # its small vision transformer has as many as the base one (arXiv 2104.02057, table 3), timm's 6


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whose features: a run's backbone, or that of a file.

    Attributes:
        run: a run folder.
        weights: a file instead: an exported backbone, a checkpoint of the paper's release, MoCo, SimSiam or DINO, or
            weights of timm or torchvision.
        network: online or target, where there are both; by default the one that people evaluate.
        arch: timm's name of the file's architecture, if neither the file nor its tensors tell it. With a tag, such as
            vit_base_patch16_224.augreg_in21k, images are normalised as for those weights.
        untrained: the run's initial weights instead, or random ones of `arch`, for comparison.
        resize: the image's short side is resized to this many pixels; by default as the run's recipe says, or 256.
        crop: side of the square that is cut then, by default as the run's recipe says, or 224.
    """

    run: Path | None = None
    weights: Path | None = None
    network: Network | None = None
    arch: str | None = None
    untrained: bool = False
    resize: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        if self.run is None and self.weights is None and not (self.untrained and self.arch):
            raise InputError(
                "no backbone is named: give a run folder with --run, a file with --weights, or a random network with "
                "--untrained --arch NAME."
            )
        if self.untrained and (self.weights is not None or self.network is not None):
            raise InputError(
                "untrained excludes weights and network: leave --untrained out, or --weights and --network."
            )
        if self.weights is None and self.run is not None and self.arch is not None:
            raise InputError(f"arch is {self.arch!r} but the run's recipe names its architecture: leave --arch out.")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A backbone that is ready to be measured.

    Attributes:
        name: a short name for tables and files, such as online or untrained.
        backbone: images [B, 3, S, S], normalised as for ImageNet, to features [B, D]; in eval mode on the CPU.
        architecture: timm's name.
        evaluation: resize, crop and what kNN asks for.
        recipe: of the run, if there is one.
        folder: of the run, if there is one.
        about: where the weights come from, in words.
        digest: a hash of all parameters and buffers, 16 hexadecimal digits.
    """

    name: str
    backbone: nn.Module
    architecture: str
    evaluation: Evaluation
    recipe: Recipe | None = None
    folder: RunFolder | None = None
    about: str = ""
    digest: str = ""


def load_subject(subject: Subject) -> Measured:
    """Build the backbone and load its weights.

    Raises:
        InputError: the run or file is missing, damaged or of an unknown layout, or the weights fit no architecture.
    """
    folder = None if subject.run is None else RunFolder(subject.run)
    recipe = None if folder is None else folder.recipe()
    if subject.weights is not None:
        measured = _of_file(subject, subject.weights, recipe)
    elif recipe is None or folder is None:
        backbone = _build(subject.arch or "")
        measured = Measured(
            name="untrained", backbone=backbone, architecture=subject.arch or "", evaluation=Evaluation()
        )
    elif subject.untrained:
        measured = Measured(
            name="untrained",
            backbone=initial_backbone(recipe),
            architecture=recipe.backbone.name,
            evaluation=recipe.evaluation,
        )
    else:
        measured = _of_run(folder, recipe, subject.network or "online")
    base = measured.evaluation if recipe is None else recipe.evaluation
    resize = subject.resize or (max(base.resize, subject.crop) if subject.crop else base.resize)
    evaluation = Evaluation(
        every_epochs=base.every_epochs,
        resize=resize,
        crop=subject.crop or min(base.crop, resize),
        k=base.k,
        temperature=base.temperature,
        max_train=base.max_train,
    )
    return Measured(
        name=measured.name,
        backbone=measured.backbone.eval(),
        architecture=measured.architecture,
        evaluation=evaluation,
        recipe=recipe,
        folder=folder,
        about=measured.about,
        digest=_digest(measured.architecture, measured.backbone),
    )


def _digest(architecture: str, backbone: nn.Module) -> str:
    digest = hashlib.sha256(architecture.encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _of_run(folder: RunFolder, recipe: Recipe, network: Network) -> Measured:
    """The backbone of a run's last checkpoint, or of its exported file where no checkpoint is left."""
    backbone = build_backbone(recipe.backbone, drop_path=False)
    if network == "online" and not folder.last.exists() and folder.backbone.exists():
        load_tensors(backbone, dict(read_weights(folder.backbone)), recipe.backbone.name, str(folder.backbone))
        about = str(folder.backbone)
    else:
        saved = checkpoint.load(folder.last)
        weights = saved.state["step"][network]
        if weights is None:
            raise InputError(
                f"network is 'target' but the run in {folder.path} has none of its own ({recipe.method} takes the "
                "online network's embeddings as targets): leave --network out."
            )
        prefix = "backbone."
        mine = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
        load_tensors(backbone, mine, recipe.backbone.name, str(saved.path))
        about = f"{network} network, step {saved.meta['step']}"
    return Measured(
        name=network, backbone=backbone, architecture=recipe.backbone.name, evaluation=recipe.evaluation, about=about
    )


def _of_file(subject: Subject, path: Path, recipe: Recipe | None) -> Measured:
    found = find_networks(read_weights(path), network=subject.network, where=str(path))
    tensors = from_torchvision(found.backbone)
    known = None if recipe is None else recipe.backbone.name
    name = subject.arch or read_metadata(path).get("architecture") or known or _their_name(found.architecture, tensors)
    if name is None:
        raise InputError(
            f"{path} ({found.layout}) does not tell its architecture: name it as timm does, for example "
            "--arch resnet50."
        )
    heads = _MOCO_V3_HEADS if found.layout == "MoCo v3" and name.startswith("vit_small") else None
    backbone = _build(name, heads=heads)
    load_tensors(backbone, tensors, name, str(path))
    config = timm.models.get_pretrained_cfg(name) if "." in name else None
    evaluation = Evaluation()
    if config is not None:
        crop = config.input_size[-1]
        evaluation = Evaluation(resize=max(crop, int(crop / config.crop_pct)), crop=crop)
        backbone = _renormalised(backbone, tuple(config.mean), tuple(config.std))
    about = f"{path.name}: {found.layout}, {found.network} network"
    return Measured(name=path.stem, backbone=backbone, architecture=name, evaluation=evaluation, about=about)


def _their_name(said: str | None, tensors: Mapping[str, Tensor]) -> str | None:
    """What the tensors tell comes first: names of networks differ between projects."""
    guessed = guess_architecture(tensors)
    if guessed is not None:
        return guessed
    name = _THEIR_NAMES.get(said or "", said)
    return name if name is not None and timm.is_model(name) else None


def _build(name: str, *, heads: int | None = None) -> nn.Module:
    """A random backbone, the same each time; with another number of attention heads than timm's where one is given."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if heads is None:
            return build_backbone(Backbone(name=name), drop_path=False)
        backbone: nn.Module = timm.create_model(name, num_classes=0, dynamic_img_size=True, num_heads=heads)
        return backbone


def load_tensors(backbone: nn.Module, tensors: dict[str, Tensor], name: str, where: str) -> None:
    """Load tensors under timm's names; the classifier is left out, and counters of old BatchNorms may be missing.

    Raises:
        InputError: they do not fit; some of the names or shapes are told.
    """
    wanted = backbone.state_dict()
    classifier = (
        timm.get_pretrained_cfg_value(name, "classifier") if timm.is_model(name.split(".")[0]) else None
    ) or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    tensors = {
        key: value
        for key, value in tensors.items()
        if key in wanted or not any(key.startswith(f"{head}.") for head in (*heads, "fc", "head", "heads"))
    }
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    tensors = counters | tensors
    missing = [key for key in wanted if key not in tensors]
    unknown = [key for key in tensors if key not in wanted]
    shapes = [
        f"{key} {list(value.shape)} instead of {list(wanted[key].shape)}"
        for key, value in tensors.items()
        if key in wanted and value.shape != wanted[key].shape
    ]
    for what, keys in (("lacks", missing), ("has, beyond it,", unknown), ("has", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise InputError(
                f"{where} does not fit {name}: it {what} {', '.join(keys[:3])}{more}. Name the architecture it was "
                "made with (--arch), or export it anew."
            )
    backbone.load_state_dict(tensors)


class _Renormalised(nn.Module):
    """A backbone for images that are normalised otherwise than ImageNet's, which it is given all the same."""

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        ours, theirs = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]), torch.tensor([mean, std])
        self.register_buffer("scale", (ours[1] / theirs[1]).view(3, 1, 1))
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, D]."""
        features: Tensor = self.backbone(images * self.scale + self.shift)
        return features


def _renormalised(backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    if mean == IMAGENET_MEAN and std == IMAGENET_STD:
        return backbone
    return _Renormalised(backbone, mean, std)
