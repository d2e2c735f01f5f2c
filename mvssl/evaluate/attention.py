"""Where a backbone looks: attention of a vision transformer's last block, or the norm of the last feature map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipelines.runtime import InputError, invalid

MapKind = Literal["auto", "attention", "activation"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureMaps:
    """Where a backbone looks in B images, on its grid of h x w patches or cells.

    Attributes:
        kind: attention or activation.
        mean: float32 [B, h, w] on the CPU, 0 or more: attention averaged over the heads, or the norm over channels.
        heads: float32 [B, H, h, w] on the CPU: attention of each head; H is 0 for activation maps.
        about: what was measured, for people.
    """

    kind: Literal["attention", "activation"]
    mean: Tensor
    heads: Tensor
    about: str


def feature_maps(backbone: nn.Module, images: Tensor, *, kind: MapKind = "auto") -> FeatureMaps:
    """The attention or activation maps of a backbone, in eval mode; its training mode is restored.

    Attention is that of the class token to the patches in the last block, softmax(q k^T / sqrt(d)): with the weight on
    the class token itself and on registers it sums to 1. Without a class token it is what a patch receives, averaged
    over all patches. Activation maps are the Euclidean norm over the channels of the last feature map before
    pooling (Zagoruyko and Komodakis, arXiv 1612.03928, take its square).

    Args:
        backbone: a timm model, or any module that makes feature maps.
        images: normalised images [B, 3, H, W] on the device of the backbone.
        kind: auto is attention if the backbone's last block has it over all patches, else activation.

    Raises:
        InputError: the backbone has no such maps.
    """
    if kind not in ("auto", "attention", "activation"):
        raise invalid("kind", kind, "auto, attention or activation", "choose one")
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            if kind != "activation":
                found = _attention(backbone, images)
                if found is not None:
                    return found
            if kind == "attention":
                raise InputError(
                    f"kind is 'attention' but {type(backbone).__name__} has no attention between all patches in its "
                    "last block: choose activation maps, or auto."
                )
            return _activation(backbone, images)
    finally:
        backbone.train(was_training)


def _attention(backbone: nn.Module, images: Tensor) -> FeatureMaps | None:
    """Attention maps; None if the last attention of the backbone is not that of all patches."""
    prefix = next((m.num_prefix_tokens for m in backbone.modules() if hasattr(m, "num_prefix_tokens")), None)
    if not isinstance(prefix, int):
        return None
    with _recorded_attention(backbone) as weights:
        backbone(images)
    if not weights:
        return None
    last = weights[-1].float().cpu()  # [B, H, T, T]
    patches = last.shape[-1] - prefix
    if last.ndim != 4 or len(last) != len(images) or last.shape[2] != last.shape[3]:
        return None
    grid = _grid(patches, images)
    if grid is None:
        return None
    has_class = prefix > 0 and any(getattr(m, "cls_token", None) is not None for m in backbone.modules())
    if has_class:
        heads = last[:, :, 0, prefix:]  # [B, H, h * w]
        about = "attention of the class token to each patch, last block"
    else:
        heads = last[:, :, prefix:, prefix:].mean(dim=2)
        about = "attention that each patch receives, on average over all patches, last block"
    heads = heads.reshape(*heads.shape[:2], *grid)
    return FeatureMaps(kind="attention", mean=heads.mean(dim=1), heads=heads, about=about)


@contextmanager
def _recorded_attention(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """Keeps the last weights [B, H, T, T] of a forward in the block; timm's fused attention is off."""
    weights: list[Tensor] = []
    fused: list[tuple[Any, bool]] = []
    hooks = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del module, inputs
        weights[:] = [output]  # of the last one so far: all of them would take much memory

    modules: list[Any] = list(backbone.modules())
    try:
        for module in modules:
            drop = getattr(module, "attn_drop", None)
            if isinstance(drop, nn.Module) and isinstance(getattr(module, "fused_attn", None), bool):
                fused.append((module, module.fused_attn))
                module.fused_attn = False
                hooks.append(drop.register_forward_hook(keep))
        yield weights
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in fused:
            module.fused_attn = was


def _grid(patches: int, images: Tensor) -> tuple[int, int] | None:
    """Rows and columns of a number of patches with the aspect ratio of the images; None if there is no such grid."""
    height, width = images.shape[-2:]
    rows = round(math.sqrt(patches * height / width)) if patches > 0 else 0
    return (rows, patches // rows) if rows and rows * (patches // rows) == patches else None


_PER_CELL_NORMS = ("LayerNorm", "LayerNorm2d", "RmsNorm", "RmsNorm2d")  # after which all cells have about one norm


def _activation(backbone: nn.Module, images: Tensor) -> FeatureMaps:
    """Norms of the last feature map; of a transformer the last one before the final normalisation."""
    modules = list(backbone.modules())
    prefix = next((m.num_prefix_tokens for m in modules if hasattr(m, "num_prefix_tokens")), 0)
    prefix = prefix if isinstance(prefix, int) else 0
    channels_last = any(getattr(m, "output_fmt", None) == "NHWC" for m in modules)
    norms: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        del module, inputs
        if not isinstance(output, Tensor) or not output.is_floating_point() or len(output) != len(images):
            return
        if output.ndim == 4:  # [B, C, h, w], or [B, h, w, C]
            found = output.float().norm(dim=-1 if channels_last else 1)
        elif output.ndim == 3 and (grid := _grid(output.shape[1] - prefix, images)) is not None:
            found = output[:, prefix:].float().norm(dim=-1).reshape(len(output), *grid)
        else:
            return
        if not norms or min(found.shape[-2:]) > 1:
            norms[:] = [found.cpu()]

    hooks = [
        m.register_forward_hook(keep) for m in modules if m is not backbone and type(m).__name__ not in _PER_CELL_NORMS
    ]
    try:
        backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not norms:
        raise InputError(
            f"The backbone, a {type(backbone).__name__}, makes no feature maps [B, C, h, w], so that there is nothing "
            "to show: choose another one."
        )
    (mean,) = norms
    return FeatureMaps(
        kind="activation",
        mean=mean,
        heads=mean.new_empty(len(mean), 0, *mean.shape[1:]),
        about="norm over the channels of the last feature map",
    )
