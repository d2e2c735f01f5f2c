"""Samples and validates augmentation parameters: crop, flip, colour, blur and cutout of each view of each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.checks import typed
from pipelines.runtime import InputError, invalid
from pipelines.views.native.sampling import params_fit, sample_native
from pipelines.views.params import SHAPES, ViewParams
from pipelines.views.randomness import check_seed, view_uniforms
from pipelines.views.reference import blur, crop_resize, cutout, grayscale, jitter, orient, solarize
from pipelines.views.spec import LARGEST_ANGLE, ViewSpec


@typed
def draw(
    specs: Sequence[ViewSpec],
    sizes: Tensor | Sequence[Sequence[int]],
    *,
    seed: int,
    epoch: int,
    index: Tensor | Sequence[int],
) -> ViewParams:
    """Sample the augmentation parameters of V views of N images.

    Those of image i in epoch e depend on seed, e, i and the view's position alone. Sampled in C if there is a compiler,
    else by `sample_reference`, with the same bits.

    Args:
        specs: V views.
        sizes: int64 [N, 2], (height, width) of each image in pixels.
        seed: in [0, 2**64).
        epoch: in [0, 2**32).
        index: int64 [N], dataset index of each image.

    Returns:
        Parameters [V, N, ...] on the CPU.

    Raises:
        InputError: no specs, sizes that are not [N, 2] or not positive, indices of another length or negative, or a
            seed or epoch out of range.
    """
    sizes = _whole_numbers("sizes", sizes)
    index = _whole_numbers("index", index)
    if not specs:
        raise InputError("specs is empty but must hold at least one view: use paper_views().")
    if sizes.dim() == 2 and sizes.shape[1] == 2 and index.shape == sizes.shape[:1]:
        check_seed(seed=seed, epoch=epoch)
        params = sample_native(specs, sizes, seed=seed, epoch=epoch, index=index)
        if params is not None:
            return params
    if sizes.dim() != 2 or sizes.shape[1] != 2 or bool((sizes < 1).any()):
        raise InputError(
            f"sizes is {tuple(sizes.shape)} but must be [N, 2], the height and width of each image, all at least 1: "
            "pass DecodedBatch.sizes."
        )
    if index.shape != sizes.shape[:1] or bool((index < 0).any()):
        raise InputError(
            f"index is {tuple(index.shape)} but must be [{len(sizes)}], one dataset index per image, none negative: "
            "pass DecodedBatch.index."
        )
    return sample_reference(specs, sizes, seed=seed, epoch=epoch, index=index)


def _whole_numbers(name: str, values: Tensor | Sequence[Any]) -> Tensor:
    """An argument as int64 on the CPU."""
    try:
        return torch.as_tensor(values, dtype=torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise invalid(name, values, "whole numbers", f"pass DecodedBatch.{name}") from error


def sample_reference(specs: Sequence[ViewSpec], sizes: Tensor, *, seed: int, epoch: int, index: Tensor) -> ViewParams:
    """As `draw`, in plain torch, for valid input."""
    u = view_uniforms(seed=seed, epoch=epoch, index=index, num_views=len(specs))  # [V, blocks, 4, N]
    views = [_sample_view(spec, sizes, u[v]) for v, spec in enumerate(specs)]
    return ViewParams(**{name: torch.stack([view[name] for view in views]) for name in views[0]})


def _sample_view(spec: ViewSpec, sizes: Tensor, u: Tensor) -> dict[str, Tensor]:
    """ViewParams of one view, [N, ...] each, from uniform numbers u float64 [blocks, 4, N]."""
    crop, flip = crop_resize.sample(spec, sizes, u)
    jitter_on, factors, order = jitter.sample(spec, u)
    return {
        "crop": crop,
        "flip": flip,
        "cutout": cutout.sample(spec, u),
        "jitter_on": jitter_on,
        "jitter": factors,
        "jitter_order": order,
        "gray": grayscale.sample(spec, u),
        "blur_sigma": blur.sample(spec, u),
        "solarize": solarize.sample(spec, u),
        **orient.sample(spec, u),
    }


def check_params(params: ViewParams, specs: Sequence[ViewSpec], sizes: Tensor) -> None:
    """Check that augmentation parameters (on the CPU) belong to V views and to N images of sizes int64 [N, 2].

    Raises:
        InputError: a shape or type is wrong, a box leaves its image or is empty, a number is not finite, or an order is
            not a permutation.
    """
    expected = (len(specs), len(sizes))
    for name, (dtype, tail) in SHAPES.items():
        tensor = getattr(params, name)
        if tensor.dtype != dtype or tuple(tensor.shape) != (*expected, *tail):
            raise InputError(
                f"ViewParams.{name} is {tensor.dtype} {tuple(tensor.shape)} but must be {dtype} {(*expected, *tail)} "
                f"for {expected[0]} views of {expected[1]} images: draw it from the same specs and batch."
            )
    if params_fit(params, specs, sizes):
        return
    _check_boxes("crop", params.crop, sizes.expand(*expected, 2), allow_none=False)
    sides = torch.tensor([spec.size for spec in specs])[:, None, None].expand(*expected, 2)
    _check_boxes("cutout", params.cutout, sides, allow_none=True)
    _check_all("jitter", params.jitter, _jitter_allowed(params.jitter), "finite, not negative, and hue in [-0.5, 0.5]")
    ordered = params.jitter_order.sort(dim=-1).values == torch.arange(4)
    _check_all("jitter_order", params.jitter_order, ordered.all(dim=-1), "a permutation of 0, 1, 2, 3")
    finite = torch.isfinite(params.blur_sigma) & (params.blur_sigma >= 0)
    _check_all("blur_sigma", params.blur_sigma, finite, "finite and not negative")
    turned = (params.quarter_turns >= 0) & (params.quarter_turns <= 3)
    _check_all("quarter_turns", params.quarter_turns, turned, "0, 1, 2 or 3")
    _check_all("angle", params.angle, params.angle.abs() <= LARGEST_ANGLE, "degrees from -360 to 360")
    for v, spec in enumerate(specs):
        if spec.blur_kernel // 2 >= spec.size and bool((params.blur_sigma[v] > 0).any()):
            raise InputError(
                f"ViewSpec({spec.name!r}).blur_kernel is {spec.blur_kernel} but must be below twice the view's "
                f"{spec.size} pixels where ViewParams.blur_sigma blurs: take a smaller kernel."
            )


def _jitter_allowed(jitter: Tensor) -> Tensor:
    """Images with valid factors: bool [V, N]."""
    factors, hue = jitter[..., :3], jitter[..., 3]
    return (torch.isfinite(factors) & (factors >= 0)).all(dim=-1) & (hue.abs() <= 0.5)


def _check_boxes(name: str, boxes: Tensor, sizes: Tensor, *, allow_none: bool) -> None:
    """Raise InputError unless each box [V, N, 4] is inside its size [V, N, 2] and has at least one pixel."""
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
