"""Every Triton kernel, interpreted on the CPU, against the reference: the same values, bit for bit.

Triton decides when it is imported whether it interprets, so these tests have a run of their own, with small views.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import DecodedBatch, ViewEngine, ViewSpec, paper_views
from pipelines.views.engine import fused_obstacle
from tests.samples.fused_samples import decided, largest_difference, noise, spec

pytestmark = pytest.mark.skipif(
    fused_obstacle(torch.device("cpu")) is not None,
    reason="needs a run with TRITON_INTERPRET=1, which tools/test.sh makes",
)
# Division, square roots and rounding are IEEE's in both, products and sums in one order: nothing may differ.
EXACT = 0.0


def test_the_papers_views() -> None:
    specs = paper_views(size=16, local_size=8, blur_kernel=9)
    batch, params = decided(noise((30, 41), (17, 16)), specs)
    assert largest_difference(batch, params, specs) == EXACT


@settings(max_examples=12)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 60),
    size=st.sampled_from([8, 16, 24]),
    kernel=st.sampled_from([1, 3, 9, 15]),
    area=st.sampled_from([None, (0.05, 0.3), (0.3, 1.0)]),
    seed=st.integers(0, 2**20),
)
def test_any_image_box_order_and_sigma(
    height: int, width: int, size: int, kernel: int, area: tuple[float, float] | None, seed: int
) -> None:
    specs = (spec(size, blur_kernel=kernel, area=area, blur_sigma=(0.1, 4.0)),)
    batch, params = decided(noise((height, width), seed=seed), specs, seed=seed)
    assert largest_difference(batch, params, specs) == EXACT


def test_flips_turns_and_rotations() -> None:
    """Nearest and bilinear, with and without fill, multiples of 90 degrees, beside a view that is level."""
    turned = {"vertical_flip": 0.5, "quarter_turns": 0.7, "blur": 0.3, "blur_kernel": 3}
    specs = (
        spec(8, rotate=180, rotate_fill=(3.5, 255, 0), **turned),
        spec(16, rotate=(-45, 30), rotate_interpolation="nearest", rotate_fill=200, **turned),
        spec(8, rotate=(-100, 100), rotate_fill=None, **turned),
        spec(8, rotate=(90, 90), **turned),
        spec(8, blur=0.0),
    )
    batch, params = decided(noise((12, 17), (9, 9), (1, 1)), specs, seed=3)
    assert largest_difference(batch, params, specs) == EXACT


def test_flips_and_turns_alone() -> None:
    specs = (spec(8, vertical_flip=0.5, quarter_turns=1.0, blur=0.0),)
    batch, params = decided(noise(*[(9, 9)] * 12), specs, seed=2)
    assert len(set((params.quarter_turns + 4 * params.vertical_flip).flatten().tolist())) > 5
    assert largest_difference(batch, params, specs) == EXACT


def test_every_order_of_the_jitter() -> None:
    """24 images, one order each; the contrast's mean is taken at its place."""
    specs = (spec(8, blur=0.0),)
    orders = torch.tensor(list(permutations(range(4))))[None]  # [1, 24, 4]
    batch, params = decided(noise(*[(9, 9)] * 24), specs, jitter_order=orders)
    assert largest_difference(batch, params, specs) == EXACT


def adversarial() -> list[torch.Tensor]:
    stripes = torch.zeros((20, 33, 3), dtype=torch.uint8)
    stripes[:, ::2] = 255
    rows = torch.zeros((31, 12, 3), dtype=torch.uint8)
    rows[1::2] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    primaries = torch.tensor([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], dtype=torch.uint8)
    nearly_gray = torch.arange(100, 200, dtype=torch.uint8)[:, None, None].repeat(1, 4, 3)
    nearly_gray[..., 1] ^= 1  # one level between channels: hue is at its most fragile
    flat = [torch.full((5, 7, 3), value, dtype=torch.uint8) for value in (0, 128, 255)]
    return [stripes, rows, primaries.reshape(2, 4, 3), nearly_gray, *flat, *noise((1, 1), (1, 90), (90, 1), (200, 9))]


@pytest.mark.parametrize("area", [None, (0.3, 1.0)], ids=["whole", "crop"])
def test_adversarial_images(area: tuple[float, float] | None) -> None:
    """Stripes that overshoot, saturated colours, grays, extreme shapes; whole images touch every border."""
    specs = (spec(8, area=area),)
    batch, params = decided(adversarial(), specs, seed=5)
    assert largest_difference(batch, params, specs) == EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_same_values(dtype: torch.dtype) -> None:
    specs = (spec(16), spec(8, blur=0.0))
    batch, params = decided(noise((20, 30), (12, 9)), specs)
    exact = ViewEngine(specs)(batch, params)
    for view, expected in zip(ViewEngine(specs, backend="fused", dtype=dtype)(batch, params), exact, strict=True):
        assert view.dtype == dtype
        if dtype == torch.float16:
            assert torch.equal(view, expected.to(dtype))
        else:  # the interpreter cuts bfloat16's extra bits off, where GPUs round
            cut = (expected.view(torch.int32) & -65536).view(torch.float32)
            assert torch.equal(view.float(), cut)


def test_rows_on_a_wider_canvas() -> None:
    (image,) = noise((21, 17))
    canvas = torch.full((21, 30, 3), 77, dtype=torch.uint8)
    canvas[:, :17] = image
    padded = DecodedBatch(
        pixels=torch.cat((torch.zeros(11, dtype=torch.uint8), canvas.reshape(-1))),
        offset=torch.tensor([11]),
        sizes=torch.tensor([[21, 17]]),
        row_stride=torch.tensor([90]),
        index=torch.tensor([0]),
        labels=torch.tensor([-1]),
    )
    specs = (spec(8),)
    _, params = decided([image], specs)
    assert largest_difference(padded, params, specs) == EXACT


def test_offsets_beyond_two_gib() -> None:
    """Pixels behind what 32 bits address; the zeros before them take no memory."""
    (image,) = noise((12, 14))
    start = 2**31 + 100
    pixels = torch.zeros(start + image.numel(), dtype=torch.uint8)
    pixels[start:] = image.reshape(-1)
    far = DecodedBatch(
        pixels=pixels,
        offset=torch.tensor([start]),
        sizes=torch.tensor([[12, 14]]),
        row_stride=torch.tensor([42]),
        index=torch.tensor([0]),
        labels=torch.tensor([-1]),
    )
    specs = (spec(8),)
    _, params = decided([image], specs)
    assert largest_difference(far, params, specs) == EXACT


def test_batches_larger_than_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.views.fused import engine

    specs = (spec(8), spec(16))
    batch, params = decided(noise((9, 9), (12, 20), (20, 12)), specs)
    monkeypatch.setattr(engine, "_IMAGES", 2)
    assert largest_difference(batch, params, specs) == EXACT


def test_nothing_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever memory held before, the views are the same."""

    specs: tuple[ViewSpec, ...] = (spec(8), spec(16))
    batch, params = decided(noise((9, 9), (12, 20)), specs)
    results = []
    for poison in (0, 85):
        real = torch.empty

        def poisoned(*shape: Any, poison: int = poison, real: Any = real, **options: Any) -> torch.Tensor:
            filled: torch.Tensor = real(*shape, **options).fill_(poison)
            return filled

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            results.append(ViewEngine(specs, backend="fused")(batch, params))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_empty_batch() -> None:
    specs = (spec(8),)
    batch, params = decided([], specs)
    assert [tuple(view.shape) for view in ViewEngine(specs, backend="fused")(batch, params)] == [(0, 3, 8, 8)]
