"""Backbones: any timm architecture that turns images into pooled features."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable

import timm
import torch
from torch import nn

from mvssl.recipe import Backbone
from pipelines.errors import InputError


def build_backbone(config: Backbone, *, drop_path: bool = True) -> nn.Module:
    """Build a randomly initialised timm model without classifier; nothing is downloaded.

    Args:
        config: name and stochastic depth rate.
        drop_path: False leaves stochastic depth out (the target network has none).

    Returns:
        A module from images [B, 3, S, S] to pooled features [B, D], float32, on the CPU. Vision transformers take any
        view size that their patches divide: the position embedding is interpolated (bicubic).

    Raises:
        InputError: timm has no such model, or it has no stochastic depth and the recipe asks for it.
    """
    if not timm.is_model(config.name.split(".")[0]):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them."
        raise InputError(f"Backbone.name is {config.name!r} but must be the name of a timm model: {hint}")
    wanted = {"drop_path_rate": config.drop_path} if drop_path and config.drop_path > 0 else {}
    # timm refuses an option that an architecture lacks with a TypeError, before any weight is drawn.
    for options in ({"dynamic_img_size": True} | wanted, wanted):
        try:
            model: nn.Module = timm.create_model(config.name, pretrained=False, num_classes=0, **options)
        except TypeError as error:
            refusal = error
            continue
        return model
    if wanted:
        raise InputError(
            f"Backbone.drop_path is {config.drop_path:g} but {config.name} cannot be built with it ({refusal}): "
            "set it to 0 or choose another backbone."
        ) from refusal
    raise InputError(
        f"Backbone.name is {config.name!r} but timm cannot build it without classifier ({refusal}): choose another one."
    ) from refusal


def feature_width(backbone: nn.Module, sizes: Iterable[int], *, name: str) -> int:
    """Width D of the features, after checking that images of every size give [B, D].

    Runs a copy of the model on the meta device: shapes only, no arithmetic.

    Args:
        backbone: the model, on any device.
        sizes: sides S of the square views in pixels.
        name: name of the architecture, for messages.

    Raises:
        InputError: the model cannot take a size, does not give one vector per image, or widths differ between sizes.
    """
    shadow = copy.deepcopy(backbone).to("meta").eval()
    dtype = next(shadow.parameters()).dtype
    widths: dict[int, int] = {}
    for size in sorted(set(sizes)):
        try:
            with torch.no_grad():
                shape = tuple(shadow(torch.zeros(2, 3, size, size, dtype=dtype, device="meta")).shape)
        except Exception as error:  # timm and torch raise many types for sizes that do not fit
            reason = " ".join(str(error).split())
            raise InputError(
                f"Backbone.name {name} cannot take views of {size} pixels ({reason}): choose a size that its patches "
                "and strides divide (a multiple of 32 suits most), or another backbone."
            ) from error
        if len(shape) != 2 or shape[0] != 2:
            raise InputError(
                f"Backbone.name {name} gives {list(shape)} for a batch of 2 views of {size} pixels but must give one "
                "vector per image, [2, D]: choose a model with pooled features."
            )
        widths[size] = shape[1]
    if len(set(widths.values())) != 1:
        raise InputError(
            f"Backbone.name {name} gives features of widths {widths} (view size: width) but must give one width for "
            "all sizes: choose a backbone with global pooling."
        )
    return next(iter(widths.values()))


def is_convolutional(backbone: nn.Module) -> bool:
    """Whether a model is a convolutional network, which channels-last memory suits.

    A vision transformer has one convolution, its patch embedding.
    """
    return sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) > 1
