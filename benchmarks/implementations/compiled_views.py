"""Views as plain torch through torch.compile: a baseline without hand-written kernels.

Crop and resize are the reference engine's, image by image, because crops differ in size. Everything after them is one
function of the whole batch without branches: every image takes every operation, and results are masked where it was not
sampled, so the compiler fuses all of it, with one graph per resolution. The augmentation parameters are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.batch import DecodedBatch
from pipelines.views.params import ViewParams
from pipelines.views.reference import crop_resize, orient
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

Photometric = Callable[[Tensor, Tensor], Tensor]
"""(uint8 [N, 3, S, S], parameters float32 [N, K]) to float32 [N, 3, S, S]."""

_FIXED = 17  # columns of the parameters before the taps of the blur


def compile_photometric(**options: Any) -> Photometric:
    """`photometric` through torch.compile; a graph is made on the first call for each shape."""
    compiled: Photometric = torch.compile(photometric, dynamic=False, fullgraph=True, **options)
    return compiled


def make_views(
    batch: DecodedBatch,
    specs: Sequence[ViewSpec],
    params: ViewParams,
    *,
    function: Photometric,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The views of a batch on its device: one [N, 3, S, S] per spec, channels-last, normalised, in `dtype`."""
    images = [batch.image(n) for n in range(len(batch))]
    views = []
    for v, spec in enumerate(specs):
        of_view = params.view(v)
        pixels = crop_resize.apply(images, of_view.crop, of_view.flip, spec.size)  # uint8 [N, 3, S, S]
        pixels = orient.apply(pixels, of_view, spec)
        table = parameter_table(spec, of_view)
        if batch.device.type == "cuda":
            table = table.pin_memory()
        view = function(pixels, table.to(batch.device, non_blocking=True))
        views.append(view.to(dtype, memory_format=torch.channels_last))
    return views


def parameter_table(spec: ViewSpec, params: ViewParams) -> Tensor:
    """The parameters of one view as a table, one row an image: float32 [N, 17 + taps].

    Columns: cutout (4), jitter on, factors (4), order (4), gray, solarize, its threshold, blur on, then the taps of the
    blur (kernel // 2 + 1, the middle one first; 1, 0, 0, ... without blur).
    """
    count = len(params.flip)
    blurs = params.blur_sigma > 0  # [N]
    distance = torch.arange(spec.blur_kernel // 2 + 1)
    sigma = torch.where(blurs, params.blur_sigma, 1.0)[:, None]
    weight = torch.exp(-0.5 * (distance / sigma) ** 2)  # [N, taps]
    weight = weight / (2 * weight.sum(dim=1, keepdim=True) - weight[:, :1])
    taps = torch.where(blurs[:, None], weight, (distance == 0).float())
    columns = (
        params.cutout,
        params.jitter_on[:, None],
        params.jitter,
        params.jitter_order,
        params.gray[:, None],
        params.solarize[:, None],
        torch.full((count, 1), spec.solarize_threshold),
        blurs[:, None],
        taps,
    )
    return torch.cat([column.float() for column in columns], dim=1)


def photometric(pixels: Tensor, table: Tensor) -> Tensor:
    """Everything after the resize: uint8 [N, 3, S, S] and parameters [N, 17 + taps] to float32 [N, 3, S, S]."""
    fixed = table[:, :_FIXED, None, None, None].unbind(dim=1)  # [N, 1, 1, 1] each
    top, left, height, width, jitter_on = fixed[:5]
    factors, order = fixed[5:9], fixed[9:13]
    gray, solarize, threshold, _ = fixed[13:]
    mean = pixels.new_tensor(IMAGENET_MEAN, dtype=torch.float32)[:, None, None]  # [3, 1, 1]
    std = pixels.new_tensor(IMAGENET_STD, dtype=torch.float32)[:, None, None]
    view = pixels.to(torch.float32, memory_format=torch.contiguous_format) / 255.0  # [N, 3, S, S]
    at = torch.arange(view.shape[-1], device=view.device)
    y, x = at[:, None], at  # [S, 1], [S]
    view = torch.where((y >= top) & (y < top + height) & (x >= left) & (x < left + width), mean, view)
    for operation in order:
        jittered = torch.where(operation == 0, (view * factors[0]).clamp(0.0, 1.0), view)
        average = _luma(view).mean(dim=(1, 2, 3), keepdim=True)
        jittered = torch.where(operation == 1, _blend(view, average, factors[1]), jittered)
        jittered = torch.where(operation == 2, _blend(view, _luma(view), factors[2]), jittered)
        jittered = torch.where(operation == 3, _hue(view, factors[3]), jittered)
        view = torch.where(jitter_on != 0, jittered, view)
    view = torch.where(gray != 0, _luma(view), view)
    taps = table[:, _FIXED:, None, None, None].unbind(dim=1)  # [N, 1, 1, 1] each
    for dim in (2, 3):
        view = _blur(view, taps, dim)
    view = torch.where((solarize != 0) & (view >= threshold), 1.0 - view, view)
    return (view - mean) / std


def _luma(view: Tensor) -> Tensor:
    """Brightness: [N, 3, S, S] to [N, 1, S, S]."""
    return 0.2989 * view[:, :1] + 0.587 * view[:, 1:2] + 0.114 * view[:, 2:]


def _blend(view: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * view + (1 - factor) * other in [0, 1]."""
    return (factor * view + (1.0 - factor) * other).clamp(0.0, 1.0)


def _hue(view: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by `shift` turns, through HSV: a channel is v - v s max(0, min(k, 4 - k, 1)) with k = n + 6 h."""
    high, low = view.amax(dim=1, keepdim=True), view.amin(dim=1, keepdim=True)  # [N, 1, S, S]
    chroma = high - low
    red, green, blue = view[:, :1], view[:, 1:2], view[:, 2:]
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )
    sixths = sixths + 6.0 * shift
    channels = []
    for start in (5.0, 3.0, 1.0):
        k = torch.remainder(start + sixths, 6.0)
        channels.append(high - chroma * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.cat(channels, dim=1)


def _blur(view: Tensor, taps: Sequence[Tensor], dim: int) -> Tensor:
    """Blur along `dim` (2 or 3) with a reflected border."""
    reach, size = len(taps) - 1, view.shape[dim]
    padded = F.pad(view, (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0), mode="reflect")
    total = taps[0] * view
    for k in range(1, reach + 1):
        total = total + taps[k] * (padded.narrow(dim, reach - k, size) + padded.narrow(dim, reach + k, size))
    return total
