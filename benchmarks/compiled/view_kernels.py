"""Bytes that each kernel of the fused view engine must move, and the time that takes at a given bandwidth.

A kernel reads each value of its inputs and writes each value of its outputs once, as if caches held everything that is
read again; the crops of one photo, which overlap, count one by one. The job tables, some 300 bytes a view, are left
out. The bytes of a view depend on its crop and its blur; the numbers are means over sampled parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipelines.views.fused.jobs import taps
from pipelines.views.params import ViewParams
from pipelines.views.presets import paper_views
from pipelines.views.sampling import draw
from pipelines.views.spec import ViewSpec

# Of upright views; a kernel for turned rows takes the place of `rows` and moves as many bytes.
KERNELS = ("weights", "columns", "rows", "color", "down", "along")
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SAMPLED = 4096  # images whose parameters the means are over


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Print the bytes of the fused engine's kernels for the paper's five views of one photo.

    Attributes:
        height: of the photo in pixels.
        width: of the photo in pixels.
        dtype: type of the views.
        terabytes_per_second: memory bandwidth that a copy reaches.
    """

    height: int = 375
    width: int = 500
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    terabytes_per_second: float = 4.3


def kernel_bytes(specs: Sequence[ViewSpec], params: ViewParams, *, value_bytes: int) -> dict[str, Tensor]:
    """Bytes that each kernel must move for each view and image.

    Args:
        specs: V views.
        params: their augmentation parameters, [V, N, ...] on the CPU.
        value_bytes: of a value of the views.

    Returns:
        int64 [V, N] for each of `KERNELS`.
    """
    height, width = params.crop[..., 2], params.crop[..., 3]  # [V, N]
    size = torch.tensor([spec.size for spec in specs])[:, None].expand(height.shape)
    blurs = params.blur_sigma > 0
    column_weights, row_weights = (2 * size * taps(length, size) for length in (width, height))  # int16 [taps, S]
    bounds = 8 * size  # int32 [S, 2] of an axis
    crop, rows, view = (
        3 * height * width,
        3 * height * size,
        3 * size * size,
    )  # bytes of uint8; `view` is also the number of values
    return {
        "weights": column_weights + row_weights + 2 * bounds + 8,  # plus the bits of both axes
        "columns": crop + column_weights + bounds + rows,
        "rows": rows + row_weights + bounds + view,
        "color": view + torch.where(blurs, 4, value_bytes) * view,
        "down": torch.where(blurs, 8 * view, 0),  # float32 in and out
        "along": torch.where(blurs, (4 + value_bytes) * view, 0),
    }


def mean_bytes(*, height: int, width: int, value_bytes: int) -> dict[str, float]:
    """Mean bytes per image that each kernel must move for the paper's five views of photos of one size."""
    specs = paper_views()
    sizes = torch.tensor([[height, width]]).expand(_SAMPLED, 2)
    params = draw(specs, sizes, seed=0, epoch=0, index=torch.arange(_SAMPLED))
    per_job = kernel_bytes(specs, params, value_bytes=value_bytes)
    return {name: float(moved.sum(dim=0).double().mean()) for name, moved in per_job.items()}


def table(arguments: Arguments, *, measured: Mapping[str, float] | None = None) -> list[str]:
    """A Markdown table of KB and microseconds per image; cells of kernels that are not in `measured` are blank."""
    moved = mean_bytes(height=arguments.height, width=arguments.width, value_bytes=VALUE_BYTES[arguments.dtype])
    times = dict(measured or {})
    if times.keys() == moved.keys():
        times["all"] = sum(times.values())
    lines = ["| kernel | KB per image | floor, us per image | measured, us per image |", "|---|---:|---:|---:|"]
    for name, count in [*moved.items(), ("all", sum(moved.values()))]:
        microseconds = count / (arguments.terabytes_per_second * 1e6)
        time = f"{times[name]:.3f} " if name in times else ""
        lines.append(f"| {name} | {count / 1e3:,.0f} | {microseconds:.3f} | {time}|")
    return lines
