"""Fused backend: all views of a batch in six Triton kernels, whatever their number, sizes and augmentations; seven if
views are rotated by any angle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.views.fused.blur import along_kernel, down_kernel
from pipelines.views.fused.color import color_kernel
from pipelines.views.fused.jobs import Jobs, make_jobs
from pipelines.views.fused.orient import rotate_kernel, turned_rows_kernel
from pipelines.views.fused.resize import columns_kernel, rows_kernel, weights_kernel
from pipelines.views.params import ViewParams
from pipelines.views.reference.device import upload
from pipelines.views.spec import ViewSpec

_IMAGES = 256
_PARTS = 16  # programs per job


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        kernel: the jitted function.
        constants: its compile-time block sizes.
        num_warps: warps of a program.
    """

    kernel: Any
    constants: dict[str, int]
    num_warps: int = 4

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Queue the kernel in the current stream."""
        # Without fused multiply-add sums have the reference's bits; memory is the bottleneck anyway.
        self.kernel[grid](*arguments, **self.constants, num_warps=self.num_warps, enable_fp_fusion=False)


LAUNCHES = {
    "weights": Launch(kernel=weights_kernel, constants={"block": 128}),
    "columns": Launch(kernel=columns_kernel, constants={"block_rows": 8, "block": 64}),
    "rows": Launch(kernel=rows_kernel, constants={"block": 512}),
    "turned_rows": Launch(kernel=turned_rows_kernel, constants={"block": 512}),
    "rotate": Launch(kernel=rotate_kernel, constants={"block": 512}),
    "color": Launch(kernel=color_kernel, constants={"block": 512}),
    "down": Launch(kernel=down_kernel, constants={"block": 1024}),
    "along": Launch(kernel=along_kernel, constants={"block": 512}),
}
"""The kernels in launch order: `turned_rows` instead of `rows` if a view is turned, `rotate` if one is rotated."""


def make_views(
    batch: DecodedBatch, specs: Sequence[ViewSpec], params: ViewParams, *, dtype: torch.dtype
) -> list[Tensor]:
    """Make all views of a batch, as `pipelines.views.reference.engine.make_views`, without a host sync.

    The views share one buffer. Intermediate results take about 3 MB per image for the paper's views, for at most
    `_IMAGES` images at a time.
    """
    values = [len(batch) * spec.size**2 * 3 for spec in specs]
    out = torch.empty(sum(values), dtype=dtype, device=batch.device)
    for start in range(0, len(batch), _IMAGES):
        _launch(batch, make_jobs(batch, specs, params, images=slice(start, start + _IMAGES)), out)
    return [
        part.view(len(batch), spec.size, spec.size, 3).permute(0, 3, 1, 2)  # [N, 3, S, S]
        for part, spec in zip(torch.split(out, values), specs, strict=True)
    ]


def _launch(batch: DecodedBatch, jobs: Jobs, out: Tensor) -> None:
    """Launch the kernels for some jobs."""
    device = batch.device
    numbers, reals = upload(jobs.numbers, device), upload(jobs.reals, device)
    weights = torch.empty(jobs.weights, dtype=torch.int16, device=device)
    bounds = torch.empty(jobs.bounds, dtype=torch.int32, device=device)
    precisions = torch.empty(2 * len(jobs), dtype=torch.int32, device=device)
    resized = torch.empty(jobs.row_bytes, dtype=torch.uint8, device=device)
    views = torch.empty(jobs.view_bytes, dtype=torch.uint8, device=device)
    sums = torch.zeros(len(jobs), dtype=torch.int64, device=device)
    blurred = torch.empty(jobs.floats, dtype=torch.float32, device=device)
    width = jobs.reals.shape[1]

    def parts(name: str, planes: int = 1) -> int:
        return -(-planes * jobs.largest**2 // LAUNCHES[name].constants["block"])

    LAUNCHES["weights"]((len(jobs), 2), numbers, weights, bounds, precisions)
    LAUNCHES["columns"]((len(jobs), _PARTS), numbers, batch.pixels, weights, bounds, precisions, resized)
    rows = (numbers, reals, width, resized, weights, bounds, precisions, views, sums)
    if jobs.turned:
        level = torch.empty(jobs.view_bytes if len(jobs.rotated) else 0, dtype=torch.uint8, device=device)
        LAUNCHES["turned_rows"]((len(jobs), parts("turned_rows")), *rows, level)
        if len(jobs.rotated):
            which, rotations = upload(jobs.rotated, device), upload(jobs.rotations, device)
            grid = (len(which), parts("rotate"))
            LAUNCHES["rotate"](grid, numbers, reals, width, which, rotations, level, views, sums)
    else:
        LAUNCHES["rows"]((len(jobs), parts("rows")), *rows)
    LAUNCHES["color"]((len(jobs), parts("color")), numbers, reals, width, views, sums, blurred, out)
    if len(jobs.blurred):
        which = upload(jobs.blurred, device)
        halfway = torch.empty_like(blurred)
        LAUNCHES["down"]((len(which), parts("down", 3)), numbers, reals, width, which, blurred, halfway)
        LAUNCHES["along"]((len(which), parts("along")), numbers, reals, width, which, halfway, out)
