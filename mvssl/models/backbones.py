"""Backbones: any timm architecture with pooled features, initialised as by timm or by the reference implementation."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mvssl.config.recipe import Backbone
from mvssl.models import small_resnets, wide_resnets  # noqa: F401  (register their names with timm)
from pipelines.runtime import InputError, shown
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD

Module = TypeVar("Module", bound=nn.Module)


def build_backbone(config: Backbone, *, drop_path: bool = True) -> nn.Module:
    """Build a randomly initialised timm model without classifier; nothing is downloaded.

    Args:
        config: name, stochastic depth rate, initialisation and whether the first convolution is frozen.
        drop_path: False for no stochastic depth (the target network).

    Returns:
        A module from images [B, 3, S, S] to pooled features [B, D], float32, on the CPU. Vision transformers accept any
        multiple of their patch size, to which the learned position embedding is interpolated (14 x 14 to 6 x 6 for 96
        pixels) as `config.pos_embed` says.

    Raises:
        InputError: timm has no such model, or it lacks stochastic depth or a convolution that the recipe requires.
    """
    check_architecture(config.name)
    model = _create(config, {"drop_path_rate": config.drop_path} if drop_path and config.drop_path > 0 else {})
    if config.init == "release":
        init_as_reference(model)
    if config.pos_embed == "release":
        _interpolate_as_reference(model, config.name)
    if config.freeze_stem:
        _freeze_stem(model, config.name)
    if config.mean is not None or config.std is not None:
        _renormalise(model, config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD)
    return model


def check_architecture(name: str) -> None:
    """Raise InputError unless timm has a model of this name, with or without a tag."""
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name[:100], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them."
        raise InputError(f"Backbone.name is {shown(name)} but must be the name of a timm model: {hint}")


def _renormalise(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Make a model convert ImageNet-normalised images to those of its own normalisation, before its first layer.

    Its parameters, and what it saves, do not change.
    """
    ours, own = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]), torch.tensor([tuple(mean), tuple(std)])
    model.register_buffer("input_scale", (ours[1] / own[1]).view(3, 1, 1), persistent=False)
    model.register_buffer("input_shift", ((ours[0] - own[0]) / own[1]).view(3, 1, 1), persistent=False)
    model.register_forward_pre_hook(_to_own_normalisation)
    vars(model)[_OWN] = (tuple(mean), tuple(std))


_OWN = "own_normalisation"


def input_normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation to which a model of `build_backbone` converts images; None if ImageNet's."""
    found: tuple[tuple[float, ...], tuple[float, ...]] | None = vars(model).get(_OWN)
    return found


def _to_own_normalisation(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """[B, 3, S, S] in any float type, renormalised in float32 or better."""
    images, *others = inputs
    own = images * model.get_buffer("input_scale") + model.get_buffer("input_shift")
    return (own.to(images.dtype), *others)


def normalisation(config: Backbone) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
    """Mean and standard deviation of the images that such a backbone takes; None if ImageNet's."""
    if config.mean is None and config.std is None:
        return None
    return config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD


def _create(config: Backbone, wanted: dict[str, float]) -> nn.Module:
    """Create the timm model with these options, and with support for any image size if it has that."""
    # timm raises TypeError for unsupported options, before it initialises any weight.
    for options in ({"dynamic_img_size": True} | wanted, wanted):
        try:
            model: nn.Module = timm.create_model(config.name, pretrained=False, num_classes=0, **options)
        except TypeError as error:
            refusal = error
            continue
        except (RuntimeError, ValueError, AssertionError) as error:  # a tag that does not exist, or is an address
            raise InputError(
                f"Backbone.name is {shown(config.name)} but timm cannot build it ({str(error).splitlines()[0]}): "
                "leave the tag behind the dot out, or name another model."
            ) from error
        return model
    if wanted:
        raise InputError(
            f"Backbone.drop_path is {config.drop_path:g} but {config.name} cannot be built with it ({refusal}): "
            "set it to 0 or choose another backbone."
        ) from refusal
    raise InputError(
        f"Backbone.name is {config.name!r} but timm cannot build it without classifier ({refusal}): choose another one."
    ) from refusal


def _freeze_stem(model: nn.Module, name: str) -> None:
    """Freeze the first convolution in module order: a ResNet's conv1, or a patch embedding.

    Freezing the patch embedding is from MoCo v3 (Chen et al., arXiv 2104.02057, section 4.2).
    """
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is None:
        raise InputError(
            f"Backbone.freeze_stem is True but {name} has no convolution to freeze: set it to False or choose another "
            "backbone."
        )
    stem.requires_grad_(False)


class ReferencePositions(VisionTransformer):
    """timm's plain vision transformer whose position embedding is interpolated as by the reference implementation.

    Bicubically without antialiasing, and by the factor (target + 0.1) / source instead of to the exact size (PAPER.md
    section 3); 0.1 keeps the rounded size right. At the embedding's own size it equals timm's.
    """

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add position embeddings to patches [B, H, W, C]; [B, 1 + H * W, C]."""
        batch, height, width, features = x.shape
        rows, columns = self.patch_embed.grid_size
        positions: Tensor | None = self.pos_embed
        if (height, width) == (rows, columns) or positions is None or self.cls_token is None:
            unchanged: Tensor = super()._pos_embed(x)
            return unchanged
        grid = positions[:, 1:].reshape(1, rows, columns, features).permute(0, 3, 1, 2)  # [1, C, rows, columns]
        grid = F.interpolate(
            grid.to(torch.promote_types(grid.dtype, torch.float32)),
            scale_factor=((height + 0.1) / rows, (width + 0.1) / columns),
            mode="bicubic",
        ).to(grid.dtype)
        positions = torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1)  # [1, 1 + H * W, C]
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), x.reshape(batch, -1, features)], dim=1)
        embedded: Tensor = self.pos_drop(tokens + positions)
        return embedded


def _interpolate_as_reference(model: nn.Module, name: str) -> None:
    """Make a plain vision transformer interpolate its position embedding as the reference implementation, in place."""
    if (
        type(model) is not VisionTransformer
        or model.pos_embed is None
        or model.cls_token is None
        or model.num_prefix_tokens != 1
        or model.no_embed_class
    ):
        raise InputError(
            f"Backbone.pos_embed is 'release' but {name} is not a plain vision transformer with a class token and a "
            "learned position embedding: set it to 'timm' (--backbone.pos-embed timm)."
        )
    model.__class__ = ReferencePositions


@torch.no_grad()
def init_as_reference(backbone: nn.Module) -> None:
    """Initialise a new ResNet or plain vision transformer of timm as the reference implementation does, in place.

    ResNet: residual branches start at full strength; timm zero-initialises the last norm of each, as torchvision's
    `zero_init_residual` does. Vision transformer: Glorot-uniform patch embedding with zero bias, as in MoCo v3 (arXiv
    2104.02057), and a class token of standard deviation 0.02; timm uses smaller values. Everything else, and any other
    architecture, keeps timm's initialisation, which the reference implementation shares: He-normal over outputs for
    convolutions, standard deviation 0.02 for linear layers.
    """
    for module in backbone.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            nn.init.ones_(module.get_parameter("bn3.weight" if isinstance(module, Bottleneck) else "bn2.weight"))
    if isinstance(backbone, VisionTransformer):
        patches = backbone.patch_embed.proj
        bound = math.sqrt(6 / (patches.weight[0].numel() + patches.out_channels))
        nn.init.uniform_(patches.weight, -bound, bound)
        if patches.bias is not None:
            nn.init.zeros_(patches.bias)
        if backbone.cls_token is not None:
            nn.init.trunc_normal_(backbone.cls_token, std=0.02)


def feature_width(backbone: nn.Module, sizes: Iterable[int], *, name: str) -> int:
    """Width D of the features, computed on the meta device.

    Raises:
        InputError: the model rejects a size, does not return one vector per image, or D differs between sizes.
    """
    on_meta = copy.deepcopy(backbone).to("meta").eval()
    dtype = next(on_meta.parameters()).dtype
    widths: dict[int, int] = {}
    for size in sorted(set(sizes)):
        try:
            with torch.no_grad():
                shape = tuple(on_meta(torch.zeros(2, 3, size, size, dtype=dtype, device="meta")).shape)
        except Exception as error:  # timm and torch raise many types for sizes that do not fit
            reason = " ".join(str(error).split())
            raise InputError(
                f"Backbone.name {name} cannot take views of {size} pixels ({reason}): {_sizes_taken(backbone, size)}, "
                "or choose a backbone for all sizes, such as resnet50, vit_small_patch16_224 or convnext_tiny."
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


def _sizes_taken(backbone: nn.Module, size: int) -> str:
    """What to do about a size of views that a model rejects."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    edge = patch[0] if isinstance(patch, tuple) and patch else patch
    if not isinstance(edge, int) or size % edge == 0:
        return "give its views a size that it takes (a multiple of 32 suits most, some take a single size)"
    step = math.lcm(edge, 8)
    near = max(step, round(size / step) * step)
    return (
        f"give such views (--views.N.size, --evaluation.crop) {near} pixels, as its patches are {edge} pixels wide and "
        "sizes of views are multiples of 8"
    )


def is_convolutional(backbone: nn.Module) -> bool:
    """Whether a model is a convolutional network, and so benefits from channels-last; a ViT has a single
    convolution.
    """
    return sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) > 1


def to_memory_format(module: Module, memory_format: torch.memory_format) -> Module:
    """Convert the 4-dimensional parameters and buffers of a module in place; returns the module."""
    to: Any = module.to  # torch 2.11 has no type for it
    to(memory_format=memory_format)
    return module
