"""The fused backend on a GPU against the reference on the CPU: hard images, many draws, full size, no races."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines import DecodedBatch, ViewEngine, paper_views
from tests.samples.fused_samples import decided, largest_difference, noise, spec
from tests.samples.hard_images import hard_images

pytestmark = pytest.mark.gpu
# One byte of the resize may round the other way: 1/255, divided by the smallest standard deviation, and what a strong
# jitter makes of it. Without jitter it stays one byte.
BYTE = 1 / 255 / 0.224 + 1e-5


def test_the_papers_views_of_hard_images() -> None:
    specs = paper_views()
    batch, params = decided(hard_images(), specs)
    assert largest_difference(batch, params, specs, device="cuda") <= 2e-3


def test_resize_and_flip_alone_are_the_same_bytes() -> None:
    off: dict[str, Any] = {"jitter_p": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0, "cutout": None}
    specs = (spec(224, **off), spec(96, area=None, **off), spec(8, **off))
    batch, params = decided(hard_images(), specs)
    assert largest_difference(batch, params, specs, device="cuda") <= BYTE


def test_flips_turns_and_rotations() -> None:
    turned = {"vertical_flip": 0.5, "quarter_turns": 0.7}
    specs = (
        spec(224, rotate=180, rotate_fill=(3.5, 255, 0), **turned),
        spec(96, rotate=(-45, 30), rotate_interpolation="nearest", rotate_fill=200, **turned),
        spec(32, rotate_fill=None, rotate=20, **turned),
        spec(64, **turned),
    )
    batch, params = decided(hard_images(), specs)
    assert largest_difference(batch, params, specs, device="cuda") <= 2e-3


@pytest.mark.parametrize("part", range(8))
def test_fresh_draws(part: int) -> None:
    """200 draws of every operation in all: 25 images of other sizes in each part."""
    sizes = torch.randint(1, 300, (25, 2), generator=torch.Generator().manual_seed(part)).tolist()
    specs = (spec(32, blur_sigma=(0.1, 4.0)), spec(64, blur_kernel=23), spec(16, area=None))
    batch, params = decided(noise(*[(h, w) for h, w in sizes], seed=part), specs, seed=part)
    assert largest_difference(batch, params, specs, device="cuda") <= 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    specs = paper_views(size=64, local_size=32)
    batch, params = decided(noise((100, 120), (64, 50)), specs)
    exact = ViewEngine(specs)(batch, params)
    for view, expected in zip(ViewEngine(specs, device="cuda", dtype=dtype)(batch, params), exact, strict=True):
        torch.testing.assert_close(view.cpu(), expected.to(dtype), rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("size", [(10_000, 8), (8, 10_000), (6000, 9000)])
def test_very_large_images(size: tuple[int, int]) -> None:
    specs = (spec(32), spec(224, area=None))
    batch, params = decided(noise(size), specs)
    assert largest_difference(batch, params, specs, device="cuda") <= 2e-3


def test_repetitions_are_the_same_bits_and_nothing_is_left_unwritten() -> None:
    """What a race or an unwritten value would change: 50 runs, with the allocator's memory poisoned before each."""
    specs = paper_views()
    batch, params = decided(noise(*[(200, 300)] * 16), specs)
    engine = ViewEngine(specs, device="cuda", backend="fused")
    on_device = batch.to("cuda")
    first = [view.clone() for view in engine(on_device, params)]
    for run in range(50):
        poison = [torch.full((2**26,), float(run), device="cuda") for _ in range(4)]
        del poison
        assert all(torch.equal(a, b) for a, b in zip(first, engine(on_device, params), strict=True))


def test_the_host_does_not_wait() -> None:
    specs = paper_views(size=64, local_size=32)
    batch, params = decided(noise(*[(100, 120)] * 4), specs)
    on_device: DecodedBatch = batch.to("cuda")
    engine = ViewEngine(specs, device="cuda", backend="fused")
    engine(on_device, params)  # kernels are built, pinned memory is made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine(on_device, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
