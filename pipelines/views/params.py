"""Augmentation parameters of a batch of views, independent of any pixels."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ViewParams:
    """Augmentation parameters of V views of N images, sampled by `draw` and used by the view engine.

    Attributes:
        crop: int64 [V, N, 4], (top, left, height, width) in source pixels.
        flip: bool [V, N], horizontal flip.
        cutout: int64 [V, N, 4], (top, left, height, width) in view pixels; height 0 for no box.
        jitter_on: bool [V, N], whether the colour jitter is applied.
        jitter: float32 [V, N, 4], factors of brightness, contrast and saturation (1 is neutral), hue shift
            in turns (0 is neutral).
        jitter_order: int64 [V, N, 4], the order of the four: a permutation of 0 brightness, 1 contrast, 2 saturation,
            3 hue.
        gray: bool [V, N], grayscale.
        blur_sigma: float32 [V, N], standard deviation of the blur in pixels; 0 for no blur.
        solarize: bool [V, N].
        vertical_flip: bool [V, N], after the horizontal flip.
        quarter_turns: int64 [V, N], rotations by 90 degrees counter-clockwise, 0 to 3, after the flips.
        angle: float32 [V, N], degrees counter-clockwise of the rotation after them; 0 for none.
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
    vertical_flip: Tensor
    quarter_turns: Tensor
    angle: Tensor

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> ViewParams:
        """Copy to another device."""
        return ViewParams(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})

    def view(self, v: int) -> ViewParams:
        """Parameters of view `v`: tensors [N, ...]."""
        return ViewParams(**{f.name: getattr(self, f.name)[v] for f in fields(self)})

    def images(self, chosen: slice | Tensor) -> ViewParams:
        """Parameters of some images of one view; `self` holds tensors [N, ...] as from `view`."""
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
    "vertical_flip": (torch.bool, ()),
    "quarter_turns": (torch.int64, ()),
    "angle": (torch.float32, ()),
}
"""dtype of each field, and its shape after [V, N]."""
