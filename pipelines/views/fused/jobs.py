"""Jobs of the fused backend: one per view and image, as tables that the kernels read."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.c_library import load_library
from pipelines.views.params import ViewParams
from pipelines.views.reference.blur import kernel_half
from pipelines.views.reference.jitter import operations
from pipelines.views.reference.orient import MIRROR_COLUMNS, orientations, rotation
from pipelines.views.spec import ViewSpec

COLUMNS = (
    "crop",  # bytes from the pixel buffer's start to the crop's first pixel
    "stride",  # bytes from one source row to the next
    "height",  # of the crop
    "width",
    "size",  # S, side of the view
    "rows",  # bytes to the job's horizontally resized rows, uint8 [height, S, 3]
    "bytes",  # bytes to the job's resized view, uint8 [S, S, 3]
    "bounds",  # entries to the first source pixel and count of each output column, then of each row
    "column_weights",  # entries to the weights [column_taps, S]
    "column_taps",
    "row_weights",
    "row_taps",
    "orientation",  # bits of reference/orient.py, and ROTATED
    "cutout_top",
    "cutout_left",
    "cutout_height",  # 0 without cutout
    "cutout_width",
    "jitter",  # bit k: operation k of the colour jitter is applied
    "order_0",
    "order_1",
    "order_2",
    "order_3",
    "gray",
    "solarize",
    "reach",  # taps of the blur to one side; -1 without blur
    "blurred",  # floats to the job's image between colour and blur, float32 [3, S, S]
    "out",  # values to the view, [S, S, 3]
)
"""Columns of the integer table, int64 [J, len(COLUMNS)]."""
ROTATED = 8
"""Bit of the column "orientation": the job is rotated by an angle too."""
ROTATION = ("cosine", "sine", "bilinear", "filled", "red", "green", "blue")
"""Columns of the table of rotations; cosine and sine are over half the side."""
_READ_IN_C = ("cutout", "jitter_on", "jitter", "jitter_order", "gray", "blur_sigma", "solarize")

_SOURCE = Path(__file__).with_name("jobs.c")
_MOST_TAPS = 4096  # of a blur to one side, limit of jobs.c
View = np.dtype([("size", np.int64), ("half", np.int64), ("threshold", np.float32)], align=True)
"""The parts of a ViewSpec that jobs need, as jobs.c reads them."""

FACTORS = 4
"""Columns of jitter factors in the float table, float32 [J, 5 + taps]; then solarize threshold and blur taps."""


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """J jobs, view after view, image after image.

    Attributes:
        numbers: int64 [J, len(COLUMNS)], on the CPU.
        reals: float32 [J, 5 + taps], on the CPU.
        blurred: int64 [jobs with blur], their positions.
        row_bytes, view_bytes, bounds, weights, floats: total sizes over all jobs.
        largest: the largest side of a view.
        turned: whether any job has another orientation than upright or mirrored.
        rotated: int64 [R], positions of the jobs that are rotated; empty for most batches.
        rotations: float32 [R, len(ROTATION)] of these.
    """

    numbers: Tensor
    reals: Tensor
    blurred: Tensor
    row_bytes: int
    view_bytes: int
    bounds: int
    weights: int
    floats: int
    largest: int
    turned: bool
    rotated: Tensor
    rotations: Tensor

    def __len__(self) -> int:
        return len(self.numbers)


def make_jobs(batch: DecodedBatch, specs: Sequence[ViewSpec], params: ViewParams, *, images: slice) -> Jobs:
    """Jobs of V views of some images of a batch, from checked parameters [V, N, ...] on the CPU.

    Computed in C if there is a compiler, else by `make_jobs_reference`, with the same bits.
    """
    library = load_library(_SOURCE)
    half = max(spec.blur_kernel // 2 for spec in specs) + 1
    if isinstance(library, str) or half > _MOST_TAPS:
        return make_jobs_reference(batch, specs, params, images=images)
    first, stop, _ = images.indices(len(batch))
    count = max(0, stop - first)
    numbers = torch.empty((len(specs) * count, len(COLUMNS)), dtype=torch.int64)
    reals = torch.zeros((len(numbers), FACTORS + 1 + half))
    blurred = torch.empty(len(numbers), dtype=torch.int64)
    orientation, turns = _turns(specs, params, images=images)
    tensors = [batch.offset, batch.row_stride, params.crop, orientation]
    tensors = [tensor.contiguous() for tensor in (*tensors, *(getattr(params, name) for name in _READ_IN_C))]
    totals = _Totals()
    library.make_jobs(
        ctypes.c_void_p(_views(tuple(specs)).ctypes.data),
        ctypes.c_int64(len(specs)),
        (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors)),
        *(ctypes.c_int64(number) for number in (len(batch), first, count, half)),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (numbers, reals, blurred)),
        ctypes.byref(totals),
    )
    return Jobs(
        numbers=numbers,
        reals=reals,
        blurred=blurred[: totals.blurred],
        row_bytes=totals.rows,
        view_bytes=totals.views,
        bounds=totals.bounds,
        weights=totals.weights,
        floats=totals.floats,
        largest=max(spec.size for spec in specs),
        **turns,
    )


class _Totals(ctypes.Structure):
    """`Totals` of jobs.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "views", "bounds", "weights", "floats", "blurred")]


@functools.lru_cache(maxsize=64)
def _views(specs: tuple[ViewSpec, ...]) -> np.ndarray:
    """View [V] of these specs."""
    return np.array([(spec.size, spec.blur_kernel // 2 + 1, spec.solarize_threshold) for spec in specs], dtype=View)


def make_jobs_reference(batch: DecodedBatch, specs: Sequence[ViewSpec], params: ViewParams, *, images: slice) -> Jobs:
    """As `make_jobs`, in plain torch."""
    orientation, turns = _turns(specs, params, images=images)
    numbers = torch.arange(len(batch))[images]  # [n]
    params = ViewParams(**{field.name: getattr(params, field.name)[:, images] for field in fields(ViewParams)})
    offset, row_stride = batch.offset[images], batch.row_stride[images]
    views, count = len(specs), len(numbers)

    def per_view(values: Sequence[int]) -> Tensor:
        return torch.tensor(values)[:, None].expand(views, count)

    size = per_view([spec.size for spec in specs])
    top, left, height, width = params.crop.unbind(dim=-1)  # [V, N]
    column_taps, row_taps = taps(width, size), taps(height, size)
    weight_counts = torch.stack((column_taps * size, row_taps * size), dim=-1)  # [V, N, 2]
    weight_starts, weights = _starts(weight_counts)
    rows, row_bytes = _starts(height * size * 3)
    view_bytes, all_view_bytes = _starts(size * size * 3)
    bounds, all_bounds = _starts(4 * size)
    blurs = params.blur_sigma > 0
    half = max(spec.blur_kernel // 2 for spec in specs) + 1
    blur_taps = torch.zeros((views, count, half))
    for v, spec in enumerate(specs):
        used = kernel_half(params.blur_sigma[v].clamp(min=1e-3), spec.blur_kernel)
        blur_taps[v, :, : used.shape[1]] = used
    blurred, floats = _starts(torch.where(blurs, size * size * 3, 0))
    wanted = operations(params.jitter_on, params.jitter)  # [V, N, 4]
    columns = {
        "crop": offset + top * row_stride + left * 3,
        "stride": row_stride.expand(views, count),
        "height": height,
        "width": width,
        "size": size,
        "rows": rows,
        "bytes": view_bytes,
        "bounds": bounds,
        "column_weights": weight_starts[..., 0],
        "column_taps": column_taps,
        "row_weights": weight_starts[..., 1],
        "row_taps": row_taps,
        "orientation": orientation[:, images],
        **dict(
            zip(("cutout_top", "cutout_left", "cutout_height", "cutout_width"), params.cutout.unbind(-1), strict=True)
        ),
        "jitter": (wanted * torch.tensor([1, 2, 4, 8])).sum(dim=-1),
        **{f"order_{turn}": params.jitter_order[..., turn] for turn in range(4)},
        "gray": params.gray,
        "solarize": params.solarize,
        "reach": torch.where(blurs, (blur_taps > 0).sum(dim=-1) - 1, -1),
        "blurred": blurred,
        "out": _starts(per_view([len(batch) * spec.size**2 * 3 for spec in specs])[:, 0])[0][:, None]
        + numbers * size * size * 3,
    }
    table = torch.stack([columns[name].to(torch.int64).reshape(-1) for name in COLUMNS], dim=1)
    thresholds = torch.tensor([spec.solarize_threshold for spec in specs])[:, None, None].expand(views, count, 1)
    reals = torch.cat((params.jitter, thresholds, blur_taps), dim=-1).reshape(views * count, -1)
    return Jobs(
        numbers=table,
        reals=reals,
        blurred=blurs.reshape(-1).nonzero().squeeze(1),
        row_bytes=row_bytes,
        view_bytes=all_view_bytes,
        bounds=all_bounds,
        weights=weights,
        floats=floats,
        largest=max(spec.size for spec in specs),
        **turns,
    )


def _turns(specs: Sequence[ViewSpec], params: ViewParams, *, images: slice) -> tuple[Tensor, dict[str, Any]]:
    """Column "orientation" of all images, uint8 [V, N], and what `Jobs` says of the rotations of some."""
    orientation, rotates = orientations(params)
    rotates = rotates[:, images]
    if not rotates.any():
        none = {"rotated": torch.empty(0, dtype=torch.int64), "rotations": torch.empty((0, len(ROTATION)))}
        return orientation, {"turned": bool((orientation[:, images] > MIRROR_COLUMNS).any()), **none}
    orientation[:, images] |= rotates * ROTATED
    which = rotates.nonzero()  # [R, 2]
    sizes = torch.tensor([spec.size for spec in specs])
    constants = [
        (spec.rotate_interpolation == "bilinear", spec.fill_colour is not None, *(spec.fill_colour or (0, 0, 0)))
        for spec in specs
    ]
    matrices = rotation(params.angle[:, images][rotates], sizes[which[:, 0]])  # [R, 2]
    table = torch.cat((matrices, torch.tensor(constants, dtype=torch.float32)[which[:, 0]]), dim=1)
    rotated = which[:, 0] * rotates.shape[1] + which[:, 1]
    return orientation, {"turned": True, "rotated": rotated, "rotations": table}


def taps(length: Tensor, size: Tensor) -> Tensor:
    """Maximal number of source pixels per output pixel of an axis resized from `length` to `size` pixels, int64.

    The cubic kernel reaches 2 pixels of the coarser grid to each side.
    """
    support = 2.0 * (length.to(torch.float64) / size).clamp(min=1.0)
    return 2 * support.ceil().to(torch.int64) + 1


def _starts(counts: Tensor) -> tuple[Tensor, int]:
    """Start of each of several concatenated arrays, and their total length."""
    ends = counts.reshape(-1).cumsum(0)
    return (ends - counts.reshape(-1)).reshape(counts.shape), int(ends[-1]) if len(ends) else 0
