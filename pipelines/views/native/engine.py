"""The native backend: torch's resize, and all that follows in one pass per image, in C.

Threads. The images are shared among as many threads as `torch.get_num_threads()` says, which end with the call; resize
and C run without Python's lock and start no threads of their own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.c_library import load_library
from pipelines.errors import InputError
from pipelines.views.ops import crop_resize
from pipelines.views.ops.blur import kernel_half
from pipelines.views.ops.jitter import operations
from pipelines.views.params import ViewParams
from pipelines.views.spec import ViewSpec

_SOURCE = Path(__file__).with_name("views.c")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Job = np.dtype(
    [
        ("flip", np.int32),
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
    library = load_library(_SOURCE)
    return library if isinstance(library, str) else None


def make_views(
    batch: DecodedBatch, specs: Sequence[ViewSpec], params: ViewParams, *, dtype: torch.dtype
) -> list[Tensor]:
    """Make all views of a batch on the CPU; as `pipelines.views.reference.make_views`, with the same bits.

    Raises:
        InputError: the library could not be built, or not with float16.
    """
    library = load_library(_SOURCE)
    if isinstance(library, str):
        raise InputError(f"backend is 'native' but cannot be used: {library}; take backend 'reference'.")
    if dtype is torch.float16 and not library.has_float16():
        raise InputError("dtype is float16 but the C compiler lacks it: take float32, or backend 'reference'.")
    images = [batch.image(n) for n in range(len(batch))]  # uint8 [H, W, 3] each, no copy
    makers = [_Maker(library, images, spec, params.view(v), dtype) for v, spec in enumerate(specs)]
    threads = min(torch.get_num_threads(), max(1, len(images)))
    shares = [range(first, len(images), threads) for first in range(threads)]

    def work(share: range) -> None:
        for maker in makers:
            maker(share)

    if threads == 1:
        work(shares[0])
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="mvssl-views") as pool:
            list(pool.map(work, shares))
    return [maker.view for maker in makers]


class _Maker:
    """Makes one view of all images, some of them at a call; calls may run at the same time.

    Attributes:
        view: [N, 3, S, S], channels-last.
    """

    def __init__(
        self, library: ctypes.CDLL, images: Sequence[Tensor], spec: ViewSpec, params: ViewParams, dtype: torch.dtype
    ) -> None:
        self._library, self._images, self._spec, self._dtype = library, images, spec, _DTYPES[dtype]
        shape = (len(images), 3, spec.size, spec.size)
        self.view = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        self._crops = params.crop.tolist()
        self._taps = kernel_half(params.blur_sigma.clamp(min=1e-3), spec.blur_kernel)  # [N, K]
        self._jobs = _jobs(params, self._taps)

    def __call__(self, numbers: range) -> None:
        """Make the view of these images."""
        size = self._spec.size
        planes = torch.empty(4 * size * size + 3 * size)
        for n in numbers:
            top, left, height, width = self._crops[n]
            window = self._images[n][top : top + height, left : left + width].permute(2, 0, 1)  # [3, h, w]
            pixels = crop_resize.resize(window, size, size).permute(1, 2, 0).contiguous()  # uint8 [S, S, 3]
            self._library.make_view(
                ctypes.c_void_p(pixels.data_ptr()),
                ctypes.c_void_p(self._jobs[n : n + 1].ctypes.data),
                ctypes.c_void_p(self._taps[n].data_ptr()),
                ctypes.c_float(self._spec.solarize_threshold),
                ctypes.c_int64(size),
                ctypes.c_int32(self._dtype),
                ctypes.c_void_p(planes.data_ptr()),
                ctypes.c_void_p(self.view[n].data_ptr()),
            )


def _jobs(params: ViewParams, taps: Tensor) -> np.ndarray:
    """The table of decisions [N] for one view; `params` holds tensors [N, ...]."""
    jobs = np.zeros(len(params.flip), dtype=Job)
    wanted = operations(params.jitter_on, params.jitter)  # [N, 4]
    jobs["flip"] = params.flip.numpy()
    jobs["cutout"] = torch.where(params.cutout[:, 2:3] > 0, params.cutout, 0).numpy()
    jobs["jitter"] = (wanted * torch.tensor([1, 2, 4, 8])).sum(dim=1).numpy()
    jobs["order"] = params.jitter_order.numpy()
    jobs["gray"] = params.gray.numpy()
    jobs["reach"] = torch.where(params.blur_sigma > 0, (taps > 0).sum(dim=1) - 1, -1).numpy()
    jobs["solarize"] = params.solarize.numpy()
    jobs["factors"] = params.jitter.numpy()
    return jobs
