"""Names of the same tensors in timm, torchvision and Detectron2.

timm's and torchvision's ResNets have the same names; their vision transformers have the same layers under others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from pipelines.errors import InputError

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
