"""Checkpoint formats of other projects: where their networks are, and how their tensor names map to timm's.

Sources: the reference implementation of arXiv 2602.05845; github.com/facebookresearch/moco-v3, /moco, /simsiam, /dino.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mvssl.config.evaluation import Network
from mvssl.models import wide_resnets
from mvssl.weights.search import Tensors, backbones, is_averaged, tensors_of, unread, unwrapped
from pipelines.runtime import InputError

_MOST_NAMES, _LONGEST_NAME = 200, 100  # that are compared with those of known formats


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """How one project stores its networks in a file.

    Attributes:
        name: the project, for messages.
        networks: key under which the file holds a network's tensors; "" is the file itself. The network that the
            project evaluates comes first.
        backbone: prefix of the backbone's tensor names, by network.
        projector: prefixes of the projector's names, which may lie among the backbone's.
        predictor: prefixes of the predictors' names.
        needs: prefixes of names (without `module.`), one of which the file must have.
    """

    name: str
    networks: Mapping[Network, str]
    backbone: Mapping[Network, str]
    projector: tuple[str, ...] = ()
    predictor: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


# A new format is one entry.
CHECKPOINT_FORMATS = (
    CheckpointFormat(
        name="the reference implementation",
        networks={"online": "online_model", "target": "target_model"},
        backbone={"online": "backbone.", "target": "backbone."},
        projector=("projector.",),
        predictor=("predictors.", "predictor."),
        needs=("backbone.",),
    ),
    CheckpointFormat(
        name="MoCo v3",
        networks={"online": "state_dict", "target": "state_dict"},
        backbone={"online": "base_encoder.", "target": "momentum_encoder."},
        projector=("fc.", "head."),
        predictor=("predictor.",),
        needs=("base_encoder.", "momentum_encoder."),
    ),
    CheckpointFormat(
        name="MoCo v1 or v2",
        networks={"online": "state_dict", "target": "state_dict"},
        backbone={"online": "encoder_q.", "target": "encoder_k."},
        projector=("fc.",),
        needs=("encoder_q.", "encoder_k."),
    ),
    CheckpointFormat(
        name="SimSiam",
        networks={"online": "state_dict"},
        backbone={"online": "encoder."},
        projector=("fc.",),
        predictor=("predictor.",),
        needs=("encoder.",),
    ),
    CheckpointFormat(
        name="DINO",
        networks={"target": "teacher", "online": "student"},
        backbone={"target": "backbone.", "online": "backbone."},
        projector=("head.",),
        needs=("backbone.",),
    ),
    *(
        CheckpointFormat(
            name="a backbone",
            networks={"online": key},
            backbone={"online": prefix},
            needs=tuple(prefix + first for first in ("conv1.", "stem.", "patch_embed.", "cls_token", "conv_proj.")),
        )
        for key in ("", "state_dict", "model")
        for prefix in ("", "backbone.")
    ),
)


@dataclass(frozen=True, kw_only=True)
class FoundNetwork:
    """One network of a checkpoint.

    Attributes:
        format: name of the checkpoint format.
        network: online or target.
        choice: whether files of this format hold both networks.
        backbone: tensors under timm's or torchvision's names.
        projector: tensors as in the file, without the prefix; empty if there are none.
        predictor: the same for the predictors.
        architecture: name of the architecture according to the file; None if it does not say.
    """

    format: str
    network: Network
    choice: bool
    backbone: Tensors
    projector: Tensors
    predictor: Tensors
    architecture: str | None = None

    def heads(self, name: str) -> int | None:
        """Attention heads that tensors do not tell; None for those of timm's architecture `name`.

        MoCo v3's small vision transformer has 12 (arXiv 2104.02057, table 3), timm's 6. Files of its linear probe hold
        it without prefix, with the name and the fixed positions (none for the class token) of MoCo v3.
        """
        positions = self.backbone.get("pos_embed", self.backbone.get("encoder.pos_embedding"))
        probe = (
            self.architecture == "vit_small"
            and positions is not None
            and positions.ndim == 3
            and not positions[:, :1].any()
        )
        return 12 if name.startswith("vit_small") and (self.format == "MoCo v3" or probe) else None


def find_network(
    content: Mapping[str, Any],
    *,
    network: Network | None = None,
    where: str,
    names: Callable[[], Collection[str]] | None = None,
) -> FoundNetwork:
    """Find a network in a checkpoint: by the layout of a known project, else by the names of a backbone's tensors.

    Args:
        content: tensors, or mappings of tensors, by name.
        network: online or target; None takes the one that the project evaluates (DINO: teacher, others: online), or the
            only one.
        where: the file, for messages.
        names: the names of the architecture's tensors, if it is known.

    Raises:
        InputError: there is no backbone (the message names the nearest format), or several, or the file lacks the
            network.
    """
    for known in CHECKPOINT_FORMATS:
        sections = {side: _tensors(content, key) for side, key in known.networks.items()}
        if not any(name.startswith(known.needs) for tensors in sections.values() for name in tensors):
            continue
        parts = {side: _below(tensors, known.backbone[side]) for side, tensors in sections.items()}
        first = next((side for side in parts if parts[side]), next(iter(known.networks)))
        choice: Network = first if network is None else network
        inner, tensors = parts.get(choice, {}), sections.get(choice, {})
        if choice not in parts:
            break  # an EMA network may lie beside it
        if not inner:
            other = next(side for side in known.networks if side != choice)
            raise InputError(
                f"network is {choice!r} but {where} ({known.name}) has no such network: use --network {other}."
            )
        projector = _head(inner, known.projector) or _head(tensors, known.projector)
        return FoundNetwork(
            format=known.name,
            network=choice,
            choice=len(known.networks) > 1,
            backbone={name: value for name, value in inner.items() if not name.startswith(known.projector)},
            projector=projector,
            predictor=_head(tensors, known.predictor),
            architecture=_stated_architecture(content),
        )
    return _searched(content, network, where, names)


def _searched(
    content: Mapping[str, Any], network: Network | None, where: str, names: Callable[[], Collection[str]] | None
) -> FoundNetwork:
    """The backbone of a checkpoint of an unknown layout."""
    found = backbones(content, names) or (backbones(content, None) if names else {})
    if not found:
        odd = unread(content)
        raise InputError(
            _unknown_format(content, where)
            if odd is None
            else f"{where} holds {odd}, which is not read: save the network's state_dict() with dense tensors of "
            "floating-point numbers."
        )
    sides: dict[Network, list[str]] = {
        "online": [place for place in found if not is_averaged(place)],
        "target": [place for place in found if is_averaged(place)],
    }
    choice: Network = network or ("online" if sides["online"] else "target")
    if not sides[choice]:
        raise InputError(
            f"network is {choice!r} but {where} (a backbone in {next(iter(found)) or 'the file itself'}) holds one "
            "network only: leave --network out."
        )
    if len(sides[choice]) > 1:
        raise InputError(
            f"{where} holds several backbones ({', '.join(sides[choice][:5])}) but must hold one, and maybe its EMA: "
            "save the state_dict() of the one that is meant."
        )
    place = sides[choice][0]
    return FoundNetwork(
        format=f"a backbone in {place}" if place else "a backbone",
        network=choice,
        choice=all(sides.values()),
        backbone=found[place],
        projector={},
        predictor={},
        architecture=_stated_architecture(content),
    )


def _tensors(content: Mapping[str, Any], key: str) -> Tensors:
    """The tensors under a key ("" is the file itself)."""
    return tensors_of(content if key == "" else content.get(key))


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {unwrapped(name.removeprefix(prefix)): value for name, value in tensors.items() if name.startswith(prefix)}


def _head(tensors: Tensors, prefixes: tuple[str, ...]) -> Tensors:
    return {unwrapped(name.split(".", 1)[1]): value for name, value in tensors.items() if name.startswith(prefixes)}


def _stated_architecture(content: Mapping[str, Any]) -> str | None:
    """The architecture that training scripts store with the weights: MoCo and SimSiam as "arch", DINO as args.arch."""
    arguments = content.get("args")  # an argparse.Namespace, read as a dict
    stated = content.get("arch", arguments.get("arch") if isinstance(arguments, Mapping) else None)
    return stated if isinstance(stated, str) else None


def _unknown_format(content: Mapping[str, Any], where: str) -> str:
    sections = ("", *(str(key) for key, value in content.items() if isinstance(value, Mapping)))
    names = {
        f"{key}/" * bool(key) + ".".join(name.split(".")[:2]) for key in sections for name in _tensors(content, key)
    }
    found = [name[:_LONGEST_NAME] for name in (sorted(names) or sorted(map(str, content)))[:_MOST_NAMES]]
    expected = {
        known.name: [f"{key}/" * bool(key) + prefix for key in known.networks.values() for prefix in known.needs]
        for known in CHECKPOINT_FORMATS
    }
    nearest = max(
        expected,
        key=lambda name: max(
            difflib.SequenceMatcher(None, one, other).ratio() for one in found or [""] for other in expected[name]
        ),
    )
    examples = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    return (
        f"{where} holds {examples or 'no tensors'}, which is no known checkpoint format. The nearest one, {nearest}, "
        f"has names that start with {' or '.join(dict.fromkeys(expected[nearest]))}. Known formats: "
        f"{', '.join(expected)}. Save the backbone's state_dict() alone."
    )


# Tensor names of timm and torchvision. Their ResNets agree; their vision transformers differ in names only.
_VIT = (
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    ("patch_embed.proj.", "conv_proj."),
    ("norm.", "encoder.ln."),
)
_VIT_BLOCK = (
    ("norm1.", "ln_1."),
    ("attn.qkv.", "self_attention.in_proj_"),
    ("attn.proj.", "self_attention.out_proj."),
    ("norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.3."),
)
_TORCHVISION_BLOCK = "encoder.layers.encoder_layer_"
_RESNET = re.compile(r"(conv1\.|bn1\.|layer[1-4]\.)")


def from_torchvision(tensors: Mapping[str, Tensor]) -> Tensors:
    """Rename torchvision's tensors to timm's names; other names stay."""
    renamed = {}
    for name, tensor in tensors.items():
        block = re.match(re.escape(_TORCHVISION_BLOCK) + r"(\d+)\.(.+)", name)
        pairs, rest, start = (_VIT_BLOCK, block[2], f"blocks.{block[1]}.") if block else (_VIT, name, "")
        rest = rest.replace("mlp.linear_1.", "mlp.0.").replace("mlp.linear_2.", "mlp.3.")  # before torchvision 0.13
        renamed[start + _replace_prefix(rest, ((theirs, ours) for ours, theirs in pairs))] = tensor
    return renamed


def to_torchvision(tensors: Mapping[str, Tensor], *, architecture: str) -> Tensors:
    """Rename a timm ResNet's or vision transformer's tensors to torchvision's names, without classifier.

    Raises:
        InputError: torchvision has no such model.
    """
    if _is_resnet(tensors):
        _check_stem(tensors, "torchvision", architecture)
        return dict(tensors)
    return {_torchvision_vit_name(name, architecture): tensor for name, tensor in tensors.items()}


def to_detectron2(tensors: Mapping[str, Tensor], *, architecture: str) -> Tensors:
    """Rename a timm ResNet's tensors to Detectron2's names (stem, res2 to res5), without classifier.

    Source: detectron2/modeling/backbone/resnet.py, where a norm belongs to its convolution and the projection is
    called shortcut.

    Raises:
        InputError: the backbone is no ResNet with a 7x7 stem.
    """
    if not _is_resnet(tensors):
        raise InputError(
            f"format is 'detectron2' but {architecture} is not a ResNet, the only backbone that Detectron2's Mask "
            "R-CNN FPN takes: export it with --format timm."
        )
    _check_stem(tensors, "detectron2", architecture)
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue  # FrozenBatchNorm has none
        theirs = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
        theirs = theirs if theirs.startswith("res") else f"stem.{theirs}"
        theirs = theirs.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        renamed[re.sub(r"\bbn(\d)\.", r"conv\1.norm.", theirs)] = tensor
    return renamed


def _is_resnet(tensors: Mapping[str, Tensor]) -> bool:
    return "layer1.0.conv1.weight" in tensors and all(_RESNET.match(name) for name in tensors)


def _check_stem(tensors: Mapping[str, Tensor], format_name: str, architecture: str) -> None:
    stem = tensors.get("conv1.weight")
    if stem is None or stem.shape[0] != 64 or tuple(stem.shape[2:]) != (7, 7):
        raise InputError(
            f"format is {format_name!r} but {architecture} does not start with one 7x7 convolution of 64 channels, as "
            "all ResNets of that library do: export it with --format timm, onnx or program."
        )


def _torchvision_vit_name(name: str, architecture: str) -> str:
    block = re.match(r"blocks\.(\d+)\.(.+)", name)
    pairs, rest, start = (_VIT_BLOCK, block[2], f"{_TORCHVISION_BLOCK}{block[1]}.") if block else (_VIT, name, "")
    renamed = _replace_prefix(rest, pairs)
    if renamed == rest:
        raise InputError(
            f"format is 'torchvision' but {architecture} has {name}, which no torchvision model has: use it for "
            "ResNets and plain vision transformers, and --format timm for others."
        )
    return start + renamed


def _replace_prefix(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name)


# Blocks per stage of the ResNets (He et al., arXiv 1512.03385, table 1), by whether they are bottleneck blocks.
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    **{(True, blocks): f"resnet{depth}" for depth, blocks in wide_resnets.DEPTHS.items()},
}
_RESNEXTS = ("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d")
# Width and depth of the vision transformers (Dosovitskiy et al., arXiv 2010.11929, table 1; DeiT's for tiny and small).
_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}


def guess_architecture(tensors: Mapping[str, Tensor]) -> str | None:
    """timm's name of the architecture that has these tensors (under timm's names); None if it is not recognised."""
    try:
        return _guess_architecture(tensors)
    except (ValueError, IndexError):  # a tensor of other dimensions than its name promises
        return None


def _guess_architecture(tensors: Mapping[str, Tensor]) -> str | None:
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        return _guess_resnet(tensors)
    if "patch_embed.proj.weight" in tensors and "cls_token" in tensors:
        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        size = _VITS.get((width, depth))
        tokens = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0
        grid = round(max(tokens - 1, 0) ** 0.5)
        return f"vit_{size}_patch{patch}_{grid * patch}" if size and grid * grid == tokens - 1 else None
    return None


def _guess_resnet(tensors: Mapping[str, Tensor]) -> str | None:
    blocks = tuple(
        len({found[1] for name in tensors if (found := re.match(rf"layer{stage}\.(\d+)\.", name))})
        for stage in (1, 2, 3, 4)
    )
    bottleneck = "layer1.0.conv3.weight" in tensors
    name = _RESNETS.get((bottleneck, blocks))
    if name is None or tensors["conv1.weight"].shape[2:] != (7, 7):
        return None
    stem, inner = tensors["conv1.weight"].shape[0], tensors["layer1.0.conv1.weight"].shape[0]
    if (stem, inner) == (64, 64):
        return name
    each = tensors["layer1.0.conv2.weight"].shape[1]  # channels of a group, which are all but in a ResNeXt
    if stem == 64 and each != inner and inner % each == 0:
        grouped = f"{name.replace('resnet', 'resnext')}_{inner // each}x{each}d"
        return grouped if grouped in _RESNEXTS else None
    if (stem, inner) == (64, 128) and name in ("resnet50", "resnet101"):
        return f"wide_{name}_2"  # the only ones in timm
    multiplied = f"{name}x{stem // 64}"
    return multiplied if stem == inner and multiplied in wide_resnets.NAMES and stem % 64 == 0 else None
