"""Reference backend: every operation in torch, on any device, with the semantics of torchvision.transforms.v2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.views.params import ViewParams
from pipelines.views.reference import blur, crop_resize, cutout, grayscale, jitter, normalize, orient, solarize
from pipelines.views.spec import ViewSpec

_CPU_CHUNK = 1 << 18  # values processed at a time on a CPU: 1 MiB of float32, what a core caches


def make_views(
    batch: DecodedBatch, specs: Sequence[ViewSpec], params: ViewParams, *, dtype: torch.dtype
) -> list[Tensor]:
    """Make all views of a batch.

    Args:
        batch: N decoded images, on any device.
        specs: V views.
        params: their augmentation parameters, on the CPU.
        dtype: of the views.

    Returns:
        V tensors [N, 3, S, S], channels-last, normalised, on the batch's device. On CUDA work is queued in the
        current stream; the host waits only where the CPU has to shrink a very large crop.
    """
    images = [batch.image(n) for n in range(len(batch))]  # uint8 [H, W, 3] each, no copy
    return [_make_view(images, spec, params.view(v), batch.device, dtype) for v, spec in enumerate(specs)]


def _make_view(
    images: Sequence[Tensor], spec: ViewSpec, params: ViewParams, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """One view of all images, in chunks that fit the CPU cache: [N, 3, S, S]."""
    shape = (len(images), 3, spec.size, spec.size)
    view = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    chunk = max(1, _CPU_CHUNK // (3 * spec.size**2)) if device.type == "cpu" else max(1, len(images))
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        view[part] = _operations(images[part], spec, params.images(part))
    return view


def _operations(images: Sequence[Tensor], spec: ViewSpec, params: ViewParams) -> Tensor:
    """All operations in order: n images uint8 [H, W, 3] to float32 [n, 3, S, S]."""
    pixels = crop_resize.apply(images, params.crop, params.flip, spec.size, spec.interpolation)  # uint8 [n, 3, S, S]
    pixels = orient.apply(pixels, params, spec)
    view = normalize.to_float(pixels)  # float32 [n, 3, S, S]
    view = cutout.apply(view, params.cutout)
    view = jitter.apply(view, params.jitter_on, params.jitter, params.jitter_order)
    view = grayscale.apply(view, params.gray)
    view = blur.apply(view, params.blur_sigma, spec.blur_kernel)
    view = solarize.apply(view, params.solarize, spec.solarize_threshold)
    return normalize.apply(view)
