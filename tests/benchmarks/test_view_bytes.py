"""The bytes that the fused engine's kernels must move, against counts by hand."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.measuring.view_bytes import KERNELS, Arguments, kernel_bytes, mean_bytes, table
from pipelines import ViewSpec, draw
from pipelines.views.fused.engine import LAUNCHES


def test_counts_by_hand() -> None:
    """A crop of 30 x 80 pixels to a view of 40: the columns shrink by 2, the rows grow."""
    specs = (ViewSpec(name="a", task="t", size=40, blur=0.0), ViewSpec(name="b", task="t", size=40, blur=1.0))
    params = draw(specs, torch.tensor([[30, 80]]), seed=0, epoch=0, index=[0])
    crop = torch.tensor([0, 0, 30, 80]).expand(2, 1, 4)
    moved = kernel_bytes(specs, dataclasses.replace(params, crop=crop), value_bytes=2)
    plain = {name: int(count[0, 0]) for name, count in moved.items()}
    blurred = {name: int(count[1, 0]) for name, count in moved.items()}
    # Taps: 2 pixels of the coarser grid to each side and one: 9 of the columns, 5 of the rows. int16, int32 pairs.
    column_weights, row_weights, bounds = 9 * 40 * 2, 5 * 40 * 2, 40 * 2 * 4
    assert plain == {
        "weights": column_weights + row_weights + 2 * bounds + 2 * 4,
        "columns": 30 * 80 * 3 + column_weights + bounds + 30 * 40 * 3,
        "rows": 30 * 40 * 3 + row_weights + bounds + 40 * 40 * 3,
        "color": 40 * 40 * 3 + 40 * 40 * 3 * 2,
        "down": 0,
        "along": 0,
    }
    assert blurred == plain | {
        "color": 40 * 40 * 3 + 40 * 40 * 3 * 4,
        "down": 40 * 40 * 3 * 8,
        "along": 40 * 40 * 3 * (4 + 2),
    }


def test_every_kernel_is_counted_in_its_order() -> None:
    assert tuple(LAUNCHES) == KERNELS


def test_means_follow_the_specs() -> None:
    """Blurred are 1 + 0.1 + 2 * 0.5 * (96 / 224)**2 + 0.5 views of 224 pixels."""
    moved = mean_bytes(height=375, width=500, value_bytes=2)
    blurred = (1.6 * 224**2 + 1.0 * 96**2) * 3
    assert abs(moved["down"] / (8 * blurred) - 1) < 0.02
    assert abs(moved["along"] / (6 * blurred) - 1) < 0.02
    assert moved["columns"] > 3 * 375 * 500 * (3 * 0.625 + 2 * 0.165) * 0.95  # the crops alone


def test_the_table_leaves_blank_what_was_not_measured() -> None:
    blank, partly = table(Arguments()).splitlines(), table(Arguments(), measured={"rows": 0.5}).splitlines()
    assert len(blank) == len(KERNELS) + 3
    assert all(line.endswith(" | |") for line in blank[2:])
    assert [line for line in partly if line not in blank] == [blank[4].removesuffix("|") + "0.500 |"]
    whole = table(Arguments(), measured=dict.fromkeys(KERNELS, 0.5)).splitlines()
    assert whole[-1].endswith("| 3.000 |"), "all are their sum"
