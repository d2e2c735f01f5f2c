"""The native backend: torch's resize, and all that follows in one pass per image, in C.

Threads. The resize runs in the calling thread and torch's intra-op threads, the rest in as many threads as
`torch.get_num_threads()` says, which end with the call. C runs without Python's lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.errors import InputError
from pipelines.views.native.build import load_library
from pipelines.views.ops import crop_resize
from pipelines.views.ops.blur import kernel_half
from pipelines.views.ops.jitter import operations
from pipelines.views.params import ViewParams
from pipelines.views.spec import ViewSpec

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_IMAGES = 16  # that are resized before they are finished: their bytes stay in the cache

Job = np.dtype(
    [
        ("cutout", np.int32, 4),
        ("jitter", np.int32),
        ("order", np.int32, 4),
        ("gray", np.int32),
        ("reach", np.int32),
        ("solarize", np.int32),
        ("factors", np.float32, 4),
    ]
)
"""The decisions for one image as views.c reads them."""


def native_obstacle() -> str | None:
    """Why the native backend cannot be used here, or None. The first call builds it."""
    library = load_library()
    return library if isinstance(library, str) else None


def make_views(
    batch: DecodedBatch, specs: Sequence[ViewSpec], params: ViewParams, *, dtype: torch.dtype
) -> list[Tensor]:
    """Make all views of a batch on the CPU; as `pipelines.views.reference.make_views`, with the same bits.

    Raises:
        InputError: the library could not be built, or not with float16.
    """
    library = load_library()
    if isinstance(library, str):
        raise InputError(f"backend is 'native' but cannot be used: {library}; take backend 'reference'.")
    if dtype is torch.float16 and not library.has_float16():
        raise InputError("dtype is float16 but the C compiler lacks it: take float32, or backend 'reference'.")
    images = [batch.image(n) for n in range(len(batch))]  # uint8 [H, W, 3] each, no copy
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="mvssl-views") as pool:
        return [_make_view(library, pool, images, spec, params.view(v), dtype) for v, spec in enumerate(specs)]


def _make_view(
    library: ctypes.CDLL,
    pool: ThreadPoolExecutor,
    images: Sequence[Tensor],
    spec: ViewSpec,
    params: ViewParams,
    dtype: torch.dtype,
) -> Tensor:
    """One view of all images: [N, 3, S, S], channels-last."""
    size = spec.size
    view = torch.empty((len(images), 3, size, size), dtype=dtype, memory_format=torch.channels_last)
    taps = kernel_half(params.blur_sigma.clamp(min=1e-3), spec.blur_kernel)  # [N, K]
    jobs = _jobs(params, taps)
    threads = torch.get_num_threads()
    for start in range(0, len(images), _IMAGES):
        part = slice(start, min(start + _IMAGES, len(images)))
        pixels = crop_resize.apply(images[part], params.crop[part], params.flip[part], size)  # uint8, channels-last
        share = -(-(part.stop - part.start) // threads)
        pieces = [slice(at, min(at + share, part.stop)) for at in range(part.start, part.stop, share)]

        def finish(piece: slice, pixels: Tensor = pixels, first: int = start) -> None:
            planes = torch.empty(6 * size * size + 3 * size)
            library.make_views(
                ctypes.c_void_p(pixels.data_ptr() + (piece.start - first) * 3 * size * size),
                ctypes.c_void_p(jobs[piece].ctypes.data),
                ctypes.c_void_p(taps[piece].data_ptr()),
                ctypes.c_int64(taps.shape[1]),
                ctypes.c_float(spec.solarize_threshold),
                ctypes.c_int64(piece.stop - piece.start),
                ctypes.c_int64(size),
                ctypes.c_int32(_DTYPES[dtype]),
                ctypes.c_void_p(planes.data_ptr()),
                ctypes.c_void_p(view.data_ptr() + piece.start * 3 * size * size * view.element_size()),
            )

        if len(pieces) == 1:
            finish(pieces[0])
        else:
            list(pool.map(finish, pieces))
    return view


def _jobs(params: ViewParams, taps: Tensor) -> np.ndarray:
    """The table of decisions [N] for one view; `params` holds tensors [N, ...]."""
    jobs = np.zeros(len(params.flip), dtype=Job)
    wanted = operations(params.jitter_on, params.jitter)  # [N, 4]
    jobs["cutout"] = torch.where(params.cutout[:, 2:3] > 0, params.cutout, 0).numpy()
    jobs["jitter"] = (wanted * torch.tensor([1, 2, 4, 8])).sum(dim=1).numpy()
    jobs["order"] = params.jitter_order.numpy()
    jobs["gray"] = params.gray.numpy()
    jobs["reach"] = torch.where(params.blur_sigma > 0, (taps > 0).sum(dim=1) - 1, -1).numpy()
    jobs["solarize"] = params.solarize.numpy()
    jobs["factors"] = params.jitter.numpy()
    return jobs
