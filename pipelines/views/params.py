"""The random decisions of a batch of views, apart from any pixels."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ViewParams:
    """What was drawn for V views of N images. `draw` makes it, the view engine uses it.

    Attributes:
        crop: int64 [V, N, 4], (top, left, height, width) in source pixels.
        flip: bool [V, N], horizontal flip.
        cutout: int64 [V, N, 4], (top, left, height, width) in view pixels; height 0 makes no box.
        jitter_on: bool [V, N], whether the colour jitter is applied.
        jitter: float32 [V, N, 4], factors of brightness, contrast and saturation (1 changes nothing), shift of hue in
            turns (0 changes nothing).
        jitter_order: int64 [V, N, 4], the order of the four: a permutation of 0 brightness, 1 contrast, 2 saturation,
            3 hue.
        gray: bool [V, N], grayscale.
        blur_sigma: float32 [V, N], standard deviation of the blur in pixels; 0 does not blur.
        solarize: bool [V, N].
    """

    crop: Tensor
    flip: Tensor
    cutout: Tensor
    jitter_on: Tensor
    jitter: Tensor
    jitter_order: Tensor
    gray: Tensor
    blur_sigma: Tensor
    solarize: Tensor

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> ViewParams:
        """The same decisions with their tensors on another device."""
        return ViewParams(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})

    def view(self, v: int) -> ViewParams:
        """The decisions for view `v` alone: tensors [N, ...]."""
        return ViewParams(**{f.name: getattr(self, f.name)[v] for f in fields(self)})

    def images(self, chosen: slice | Tensor) -> ViewParams:
        """The decisions for some images of one view; `self` holds tensors [N, ...] as from `view`."""
        return ViewParams(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})


SHAPES: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "crop": (torch.int64, (4,)),
    "flip": (torch.bool, ()),
    "cutout": (torch.int64, (4,)),
    "jitter_on": (torch.bool, ()),
    "jitter": (torch.float32, (4,)),
    "jitter_order": (torch.int64, (4,)),
    "gray": (torch.bool, ()),
    "blur_sigma": (torch.float32, ()),
    "solarize": (torch.bool, ()),
}
"""Type of each field, and its shape behind [V, N]."""
