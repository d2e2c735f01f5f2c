"""Native backend: all operations of a view in one pass per image, in C.

Views have the bits of the reference where torch resizes bytes in integer arithmetic (x86 with AVX2); on other
processors the reference resizes in floating point and differs by a unit here and there. `torch.get_num_threads()`
threads share the images; each makes all its images of a view in one call that releases the GIL.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.c_library import load_library
from pipelines.runtime import InputError
from pipelines.views.params import ViewParams
from pipelines.views.reference.blur import kernel_half
from pipelines.views.reference.jitter import operations
from pipelines.views.reference.orient import orientations, rotation
from pipelines.views.spec import ViewSpec

_SOURCE = Path(__file__).with_name("views.c")
_SPARE = 2  # batches whose memory is kept
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_HOW = {("nearest", True): 1, ("nearest", False): 1, ("bilinear", True): 2, ("bilinear", False): 3}
"""Values of orient.h for an interpolation with or without a fill."""

Job = np.dtype(
    [
        ("crop", np.uint64),
        ("stride", np.int64),
        ("height", np.int32),
        ("width", np.int32),
        ("orientation", np.int32),
        ("cutout", np.int32, 4),
        ("jitter", np.int32),
        ("order", np.int32, 4),
        ("gray", np.int32),
        ("reach", np.int32),
        ("solarize", np.int32),
        ("factors", np.float32, 4),
        ("rotation", np.float32, 2),
        ("fill", np.float32, 4),
        ("how", np.int32),
    ],
    align=True,
)
"""Crop and augmentation parameters of one image, as views.c reads them."""


def native_obstacle() -> str | None:
    """Why the native backend is unavailable, or None. The first call compiles it."""
    library = load_library(_SOURCE)
    return library if isinstance(library, str) else None


def make_views(
    batch: DecodedBatch,
    specs: Sequence[ViewSpec],
    params: ViewParams,
    *,
    dtype: torch.dtype,
    memory: ViewMemory | None = None,
) -> list[Tensor]:
    """Make all views of a batch on the CPU; as `pipelines.views.reference.engine.make_views`, with the same bits.

    `memory` is for the views of all batches of these specs; by default each batch has its own.

    Raises:
        InputError: the library could not be built, or only without float16.
    """
    library = load_library(_SOURCE)
    if isinstance(library, str):
        raise InputError(f"backend is 'native' but cannot be used: {library}; take backend 'reference'.")
    if dtype is torch.float16 and not library.has_float16():
        raise InputError("dtype is float16 but the C compiler lacks it: take float32, or backend 'reference'.")
    if batch.pixels.device.type != "cpu":
        raise InputError(f"backend is 'native' but the pixels are on {batch.pixels.device}: take backend 'fused'.")
    threads = min(torch.get_num_threads(), max(1, len(batch)))
    memory = ViewMemory() if memory is None else memory
    makers = [
        _Maker(library, batch, spec, params.view(v), memory.empty(v, len(batch), spec.size, dtype))
        for v, spec in enumerate(specs)
    ]

    def work(thread: int) -> None:
        for maker in makers:
            maker(thread, threads)

    if threads == 1:
        work(0)
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="mvssl-views") as pool:
            list(pool.map(work, range(threads)))
    return [maker.view for maker in makers]


class _Maker:
    """Makes one view, some of its images per call; calls may run concurrently.

    Attributes:
        view: [N, 3, S, S], channels-last.
    """

    def __init__(
        self, library: ctypes.CDLL, batch: DecodedBatch, spec: ViewSpec, params: ViewParams, view: Tensor
    ) -> None:
        self._library, self._pixels, self._spec, self._dtype = library, batch.pixels, spec, _DTYPES[view.dtype]
        self.view = view
        self._taps = kernel_half(params.blur_sigma.clamp(min=1e-3), spec.blur_kernel).contiguous()  # [N, K]
        self._jobs = _jobs(batch, spec, params, self._taps)

    def __call__(self, begin: int, step: int) -> None:
        """Make the view of images `begin`, `begin + step` and so on.

        Raises:
            MemoryError: no memory for an intermediate image of a few times the view's width.
        """
        refused = self._library.make_views(
            ctypes.c_void_p(self._jobs.ctypes.data),
            ctypes.c_int64(len(self._jobs)),
            ctypes.c_int64(begin),
            ctypes.c_int64(step),
            ctypes.c_void_p(self._taps.data_ptr()),
            ctypes.c_int64(self._taps.shape[1]),
            ctypes.c_float(self._spec.solarize_threshold),
            ctypes.c_int64(self._spec.size),
            ctypes.c_int32(self._dtype),
            ctypes.c_void_p(self.view.data_ptr()),
        )
        if refused:
            raise MemoryError(f"No memory is left to make view '{self._spec.name}' of a batch: take a smaller batch.")


class ViewMemory:
    """Memory of views that nobody uses any more, for those of later batches: the system clears new memory, which takes
    a tenth of the time of making views.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}  # by view

    def empty(self, view: int, images: int, size: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised [N, 3, S, S], channels-last, of view number `view`; its memory comes back when it is freed.

        numpy takes huge pages, which are first touched 4 times faster.
        """
        free = self._free.setdefault(view, [])
        shape, kind = (images, size, size, 3), np.float32 if dtype is torch.float32 else np.int16
        nbytes = math.prod(shape) * np.dtype(kind).itemsize
        while free and free[-1].nbytes != nbytes:  # another batch size
            free.pop()
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(nbytes, dtype=np.uint8)
        lent = memory.view(kind).reshape(shape)
        weakref.finalize(lent, _take_back, free, memory).atexit = False  # torch holds `lent` itself
        return torch.from_numpy(lent).view(dtype).permute(0, 3, 1, 2)


def _take_back(free: list[np.ndarray], memory: np.ndarray) -> None:
    if len(free) < _SPARE:
        free.append(memory)


def _jobs(batch: DecodedBatch, spec: ViewSpec, params: ViewParams, taps: Tensor) -> np.ndarray:
    """Job [N] for one view; `params` holds tensors [N, ...]."""
    jobs = np.zeros(len(batch), dtype=Job)
    top, left, jobs["height"], jobs["width"] = params.crop.numpy().T
    stride = batch.row_stride.numpy()
    jobs["crop"] = batch.pixels.data_ptr() + batch.offset.numpy() + top * stride + left * 3
    jobs["stride"] = stride
    wanted = operations(params.jitter_on, params.jitter)  # [N, 4]
    orientation, rotates = orientations(params)
    jobs["orientation"] = orientation.numpy()
    if rotates.any():
        jobs["rotation"] = rotation(params.angle, spec.size).numpy()
        jobs["fill"][:, :3] = spec.fill_colour or (0.0, 0.0, 0.0)
        how = _HOW[spec.rotate_interpolation, spec.fill_colour is not None]
        jobs["how"] = np.where(rotates.numpy(), how, 0)
    jobs["cutout"] = torch.where(params.cutout[:, 2:3] > 0, params.cutout, 0).numpy()
    jobs["jitter"] = (wanted * torch.tensor([1, 2, 4, 8])).sum(dim=1).numpy()
    jobs["order"] = params.jitter_order.numpy()
    jobs["gray"] = params.gray.numpy()
    jobs["reach"] = torch.where(params.blur_sigma > 0, (taps > 0).sum(dim=1) - 1, -1).numpy()
    jobs["solarize"] = params.solarize.numpy()
    jobs["factors"] = params.jitter.numpy()
    return jobs
