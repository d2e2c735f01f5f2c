"""Draw the random decisions of a batch: which crop, flip, colour, blur and box each view of each image gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.errors import InputError
from pipelines.views.native.draws import draw_native
from pipelines.views.ops import blur, crop_resize, cutout, grayscale, jitter, solarize
from pipelines.views.params import ViewParams
from pipelines.views.rng import check_place, view_uniforms
from pipelines.views.spec import ViewSpec


def draw(
    specs: Sequence[ViewSpec],
    sizes: Tensor,
    *,
    seed: int,
    epoch: int,
    index: Tensor | Sequence[int],
) -> ViewParams:
    """Draw V views of N images. What image i gets in epoch e depends on nothing but seed, e, i and the view's position.

    In C where there is a compiler, else by `draw_reference`: the same bits.

    Args:
        specs: V views.
        sizes: int64 [N, 2], (height, width) of each image in pixels.
        seed: in [0, 2**64).
        epoch: in [0, 2**32).
        index: int64 [N], dataset index of each image.

    Returns:
        Decisions [V, N, ...] on the CPU.

    Raises:
        InputError: no specs, sizes that are not [N, 2] or not positive, indices of another length or negative, or a
            seed or epoch out of range.
    """
    sizes = torch.as_tensor(sizes, dtype=torch.int64, device="cpu")
    index = torch.as_tensor(index, dtype=torch.int64, device="cpu")
    if not specs:
        raise InputError("specs is empty but must hold at least one view: use paper_views().")
    if sizes.dim() == 2 and sizes.shape[1] == 2 and index.shape == sizes.shape[:1]:
        check_place(seed=seed, epoch=epoch)
        params = draw_native(specs, sizes, seed=seed, epoch=epoch, index=index)
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
    return draw_reference(specs, sizes, seed=seed, epoch=epoch, index=index)


def draw_reference(specs: Sequence[ViewSpec], sizes: Tensor, *, seed: int, epoch: int, index: Tensor) -> ViewParams:
    """As `draw`, in plain torch, for input that is in order."""
    u = view_uniforms(seed=seed, epoch=epoch, index=index, num_views=len(specs))  # [V, blocks, 4, N]
    views = [_draw_view(spec, sizes, u[v]) for v, spec in enumerate(specs)]
    return ViewParams(**{name: torch.stack([view[name] for view in views]) for name in views[0]})


def _draw_view(spec: ViewSpec, sizes: Tensor, u: Tensor) -> dict[str, Tensor]:
    """The fields of ViewParams for one view, [N, ...] each, from u float64 [blocks, 4, N]."""
    crop, flip = crop_resize.draw(spec, sizes, u)
    jitter_on, factors, order = jitter.draw(spec, u)
    return {
        "crop": crop,
        "flip": flip,
        "cutout": cutout.draw(spec, u),
        "jitter_on": jitter_on,
        "jitter": factors,
        "jitter_order": order,
        "gray": grayscale.draw(spec, u),
        "blur_sigma": blur.draw(spec, u),
        "solarize": solarize.draw(spec, u),
    }
