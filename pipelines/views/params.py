"""The random decisions of a batch of views, apart from any pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipelines.errors import InputError
from pipelines.views.spec import ViewSpec


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


_SHAPES: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
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


def check_params(params: ViewParams, specs: Sequence[ViewSpec], sizes: Tensor) -> None:
    """Check that decisions belong to these views and images.

    Args:
        params: decisions on the CPU.
        specs: V views.
        sizes: int64 [N, 2], (height, width) of the images.

    Raises:
        InputError: a shape or type is not that of V views of N images, a box leaves its image or is empty, a number is
            not finite or an order is not a permutation.
    """
    expected = (len(specs), len(sizes))
    for name, (dtype, tail) in _SHAPES.items():
        tensor = getattr(params, name)
        if tensor.dtype != dtype or tuple(tensor.shape) != (*expected, *tail):
            raise InputError(
                f"ViewParams.{name} is {tensor.dtype} {tuple(tensor.shape)} but must be {dtype} {(*expected, *tail)} "
                f"for {expected[0]} views of {expected[1]} images: draw it from the same specs and batch."
            )
    _check_boxes("crop", params.crop, sizes.expand(*expected, 2), allow_none=False)
    sides = torch.tensor([spec.size for spec in specs])[:, None, None].expand(*expected, 2)
    _check_boxes("cutout", params.cutout, sides, allow_none=True)
    _check_all("jitter", params.jitter, _jitter_allowed(params.jitter), "finite, not negative, and hue in [-0.5, 0.5]")
    ordered = params.jitter_order.sort(dim=-1).values == torch.arange(4)
    _check_all("jitter_order", params.jitter_order, ordered.all(dim=-1), "a permutation of 0, 1, 2, 3")
    finite = torch.isfinite(params.blur_sigma) & (params.blur_sigma >= 0)
    _check_all("blur_sigma", params.blur_sigma, finite, "finite and not negative")
    for v, spec in enumerate(specs):
        if spec.blur_kernel // 2 >= spec.size and bool((params.blur_sigma[v] > 0).any()):
            raise InputError(
                f"ViewSpec({spec.name!r}).blur_kernel is {spec.blur_kernel} but must be below twice the view's "
                f"{spec.size} pixels where ViewParams.blur_sigma blurs: take a smaller kernel."
            )


def _jitter_allowed(jitter: Tensor) -> Tensor:
    """Which images have usable factors: bool [V, N]."""
    factors, hue = jitter[..., :3], jitter[..., 3]
    return (torch.isfinite(factors) & (factors >= 0)).all(dim=-1) & (hue.abs() <= 0.5)


def _check_boxes(name: str, boxes: Tensor, sizes: Tensor, *, allow_none: bool) -> None:
    """Raise InputError unless each box [V, N, 4] lies inside its size [V, N, 2] and has at least one pixel."""
    corner, extent = boxes[..., :2], boxes[..., 2:]
    inside = ((corner >= 0) & (extent > 0) & (corner + extent <= sizes)).all(dim=-1)
    if allow_none:
        inside |= boxes[..., 2] == 0
    _check_all(name, boxes, inside, "(top, left, height, width) of a box with pixels, inside the image", of=sizes)


def _check_all(name: str, values: Tensor, allowed: Tensor, what: str, *, of: Tensor | None = None) -> None:
    """Raise InputError naming the first view and image [V, N] that is not allowed."""
    if bool(allowed.all()):
        return
    v, n = (~allowed).nonzero()[0].tolist()
    where = "" if of is None else f" of {of[v, n].tolist()}"
    raise InputError(
        f"ViewParams.{name}[{v}, {n}] is {values[v, n].tolist()} but must be {what}{where}: draw it for this batch."
    )
