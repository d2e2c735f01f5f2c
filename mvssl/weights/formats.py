"""Where the networks lie in other people's checkpoints. A new layout is one entry of LAYOUTS.

Sources: the release of arXiv 2602.05845; github.com/facebookresearch/moco-v3, /moco, /simsiam and /dino.

Names of the same tensors in timm, torchvision and Detectron2.

timm's and torchvision's ResNets have the same names; their vision transformers have the same layers under others.

Which timm architecture a backbone's tensors belong to, told from their names and shapes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pipelines.runtime import InputError

_BLOCK = "encoder.layers.encoder_layer_"
_VIT = (  # timm, torchvision
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
_RESNET = re.compile(r"(conv1\.|bn1\.|layer[1-4]\.)")


def to_torchvision(tensors: Mapping[str, Tensor], *, architecture: str) -> dict[str, Tensor]:
    """timm's names of a ResNet's or vision transformer's tensors as torchvision's, without classifier.

    Raises:
        InputError: a tensor has no counterpart there, or another shape.
    """
    if _is_resnet(tensors):
        _check_stem(tensors, "torchvision", architecture)
        return dict(tensors)
    return {_vit_name(name, architecture): tensor for name, tensor in tensors.items()}


def from_torchvision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names as timm's; names that are not torchvision's stay as they are."""
    renamed = {}
    for name, tensor in tensors.items():
        found = re.match(re.escape(_BLOCK) + r"(\d+)\.(.+)", name)
        pairs, rest, before = (_VIT_BLOCK, found[2], f"blocks.{found[1]}.") if found else (_VIT, name, "")
        rest = rest.replace("mlp.linear_1.", "mlp.0.").replace("mlp.linear_2.", "mlp.3.")  # before torchvision 0.13
        renamed[before + _swapped(rest, [(theirs, ours) for ours, theirs in pairs])] = tensor
    return renamed


def to_detectron2(tensors: Mapping[str, Tensor], *, architecture: str) -> dict[str, Tensor]:
    """timm's names of a ResNet's tensors as those of Detectron2's (stem, res2 to res5), without classifier.

    Source of the correspondence: detectron2/modeling/backbone/resnet.py, where a block's norm belongs to its
    convolution and the projection is called shortcut.

    Raises:
        InputError: it is no ResNet, or has another stem.
    """
    if not _is_resnet(tensors):
        raise InputError(
            f"format is 'detectron2' but {architecture} is no ResNet, the only backbone that Mask R-CNN FPN has there: "
            "export it with --format timm."
        )
    _check_stem(tensors, "detectron2", architecture)
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue  # FrozenBatchNorm has none
        theirs = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
        theirs = theirs if theirs.startswith("res") else f"stem.{theirs}"
        theirs = theirs.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        renamed[re.sub(r"\bbn(\d)\.", r"conv\1.norm.", theirs)] = tensor
    return renamed


def _check_stem(tensors: Mapping[str, Tensor], format_name: str, architecture: str) -> None:
    """Check that the first convolution is the one that other libraries' ResNets have."""
    stem = tensors.get("conv1.weight")
    if stem is None or tuple(stem.shape[2:]) != (7, 7):
        raise InputError(
            f"format is {format_name!r} but {architecture} does not begin with one 7x7 convolution, as all ResNets do "
            "there: export it with --format timm, onnx or program."
        )


def _is_resnet(tensors: Mapping[str, Tensor]) -> bool:
    return "layer1.0.conv1.weight" in tensors and all(_RESNET.match(name) for name in tensors)


def _vit_name(name: str, architecture: str) -> str:
    found = re.match(r"blocks\.(\d+)\.(.+)", name)
    pairs, rest, before = (_VIT_BLOCK, found[2], f"{_BLOCK}{found[1]}.") if found else (_VIT, name, "")
    swapped = _swapped(rest, pairs)
    if swapped == rest:
        raise InputError(
            f"format is 'torchvision' but {architecture} has {name}, which no model there has: export ResNets and "
            "plain vision transformers so, others with --format timm."
        )
    return before + swapped


def _swapped(name: str, pairs: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name)


# Blocks a stage of the ResNets (He et al., arXiv 1512.03385, table 1), by whether their blocks are bottlenecks.
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (True, (3, 24, 36, 3)): "resnet200",
}
# Width and depth of the vision transformers (Dosovitskiy et al., arXiv 2010.11929, table 1; DeiT's for tiny and small).
_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}


def guess_architecture(tensors: Mapping[str, Tensor]) -> str | None:
    """timm's name of the architecture with these tensors (names of timm); None for one that is not known here.

    Widened ResNets are told by the width of the bottleneck: wide_resnet50_2 has 128 where resnet50 has 64.
    """
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        return _resnet(tensors)
    if "patch_embed.proj.weight" in tensors and "cls_token" in tensors:
        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        size = _VITS.get((width, depth))
        tokens = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0
        grid = round(max(tokens - 1, 0) ** 0.5)
        return f"vit_{size}_patch{patch}_{grid * patch}" if size and grid * grid == tokens - 1 else None
    return None


def _resnet(tensors: Mapping[str, Tensor]) -> str | None:
    blocks = tuple(
        len({found[1] for name in tensors if (found := re.match(rf"layer{stage}\.(\d+)\.", name))})
        for stage in (1, 2, 3, 4)
    )
    bottleneck = "layer1.0.conv3.weight" in tensors
    width = tensors["layer1.0.conv1.weight"].shape[0]
    if tensors["conv1.weight"].shape[2:] != (7, 7) or width not in (64, 128):
        return None
    name = _RESNETS.get((bottleneck, blocks))
    if name is None or width == 64:
        return name
    return f"wide_{name}_2" if name in ("resnet50", "resnet101") else None


Network = Literal["online", "target"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to lay networks out in a file.

    Attributes:
        name: whose it is, for messages.
        networks: key of the file's mapping that holds a network's tensors; "" is the file itself. The first is what
            people evaluate.
        backbone: what stands in front of the backbone's names, by network; "" for nothing.
        projector: what stands in front of the projector's names; names that lie among the backbone's are taken out.
        predictor: what stands in front of the predictors' names.
        needs: beginnings of names, one of which the file must have (after `module.`).
    """

    name: str
    networks: Mapping[Network, str]
    backbone: Mapping[Network, str]
    projector: tuple[str, ...] = ()
    predictor: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


LAYOUTS = (
    Layout(
        name="the paper's release",
        networks={"online": "online_model", "target": "target_model"},
        backbone={"online": "backbone.", "target": "backbone."},
        projector=("projector.",),
        predictor=("predictors.", "predictor."),
        needs=("backbone.",),
    ),
    Layout(
        name="MoCo v3",
        networks={"online": "state_dict", "target": "state_dict"},
        backbone={"online": "base_encoder.", "target": "momentum_encoder."},
        projector=("fc.", "head."),
        predictor=("predictor.",),
        needs=("base_encoder.", "momentum_encoder."),
    ),
    Layout(
        name="MoCo v1 or v2",
        networks={"online": "state_dict", "target": "state_dict"},
        backbone={"online": "encoder_q.", "target": "encoder_k."},
        projector=("fc.",),
        needs=("encoder_q.", "encoder_k."),
    ),
    Layout(
        name="SimSiam",
        networks={"online": "state_dict"},
        backbone={"online": "encoder."},
        projector=("fc.",),
        predictor=("predictor.",),
        needs=("encoder.",),
    ),
    Layout(
        name="DINO",
        networks={"target": "teacher", "online": "student"},
        backbone={"target": "backbone.", "online": "backbone."},
        projector=("head.",),
        needs=("backbone.",),
    ),
    *(
        Layout(
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
class Found:
    """The networks of a file.

    Attributes:
        layout: name of the layout.
        network: online or target.
        backbone: tensors under the names of timm or torchvision.
        projector: tensors of the projection head, as in the file, without what stands in front; {} if there is none.
        predictor: the same of the predictors.
        architecture: what the file says of it; None if it says nothing.
        beside: the other values of the file that are no tensors.
    """

    layout: str
    network: Network
    backbone: Tensors
    projector: Tensors = field(default_factory=dict)
    predictor: Tensors = field(default_factory=dict)
    architecture: str | None = None


def find_networks(held: Mapping[str, Any], *, network: Network | None = None, where: str) -> Found:
    """Find a network in what a file holds.

    Args:
        held: names and tensors, or mappings of such.
        network: online or target; None takes the one that people evaluate (DINO's teacher, else the online one).
        where: the file, for messages.

    Raises:
        InputError: no layout fits; what was found, what was expected, and the nearest layout are named. Or the network
            is not in the file.
    """
    for layout in LAYOUTS:
        choice = network if network is not None else next(iter(layout.networks))
        tensors = _tensors(held, layout.networks.get(choice))
        others = [_tensors(held, key) for key in layout.networks.values()]
        if not any(_fits(layout, candidate) for candidate in (tensors, *others)):
            continue
        prefix = layout.backbone.get(choice)
        mine = {} if prefix is None else _below(tensors, prefix)
        if prefix is None or not mine:
            there = [name for name in layout.networks if name != choice]
            raise InputError(
                f"network is {choice!r} but {where} ({layout.name}) has no such network: use --network {there[0]}."
                if there
                else f"network is {choice!r} but {where} ({layout.name}) holds one network only: leave --network out."
            )
        inside = {name: value for name, value in mine.items() if name.startswith(layout.projector)}
        outside = {name: value for name, value in tensors.items() if name.startswith(layout.projector)}
        heads = inside or outside
        return Found(
            layout=layout.name,
            network=choice,
            backbone={name: value for name, value in mine.items() if name not in inside},
            projector={name.split(".", 1)[1]: value for name, value in heads.items()} if layout.projector else {},
            predictor={name.split(".", 1)[1]: v for name, v in tensors.items() if name.startswith(layout.predictor)}
            if layout.predictor
            else {},
            architecture=_architecture(held),
        )
    raise InputError(_unknown(held, where))


def _tensors(held: Mapping[str, Any], key: str | None) -> Tensors:
    """The tensors at a key, without the ``module.`` of a data-parallel wrapper; {} if there is nothing."""
    part = None if key is None else held if key == "" else held.get(key)
    if not isinstance(part, Mapping):
        return {}
    tensors = {str(name): value for name, value in part.items() if isinstance(value, Tensor)}
    for wrapper in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = _below(tensors, wrapper)
    return tensors


def _below(tensors: Tensors, prefix: str) -> Tensors:
    below = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix("module."): value for name, value in below.items()}


def _fits(layout: Layout, tensors: Tensors) -> bool:
    return any(name.startswith(layout.needs) for name in tensors)


def _architecture(held: Mapping[str, Any]) -> str | None:
    """The architecture that training scripts write beside the weights: MoCo and SimSiam "arch", DINO args.arch."""
    arguments = held.get("args")
    said = held.get("arch", getattr(arguments, "arch", None))
    return said if isinstance(said, str) else None


def _unknown(held: Mapping[str, Any], where: str) -> str:
    """What was found, what was expected and which layout is nearest."""
    below = {
        f"{key}/" * bool(key) + ".".join(name.split(".")[:2])
        for key in ("", *(str(key) for key, value in held.items() if isinstance(value, Mapping)))
        for name in _tensors(held, key)
    }
    found = sorted(below) or sorted(map(str, held))
    expected = {
        layout.name: [f"{key}/" * bool(key) + begin for key in layout.networks.values() for begin in layout.needs]
        for layout in LAYOUTS
    }
    nearest = max(
        expected,
        key=lambda name: max(
            difflib.SequenceMatcher(None, one, other).ratio() for one in found or [""] for other in expected[name]
        ),
    )
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    wanted = " or ".join(dict.fromkeys(expected[nearest]))
    return (
        f"{where} holds names such as {shown or 'none at all'}, a layout that is not known: the nearest is {nearest}, "
        f"with names that begin with {wanted}. Known are "
        f"{', '.join(dict.fromkeys(layout.name for layout in LAYOUTS))}: save the backbone's state_dict() alone."
    )
