"""Vertical flip, quarter turns and rotation are torchvision's, byte for byte, in the reference and in C."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pipelines import DecodedBatch, ViewEngine, ViewSpec, draw, paper_views
from pipelines.views import portable_math
from tests.samples.hard_images import BACKENDS, FLOAT_BAR, IMAGES, unnormalised, worst

OFF: dict[str, Any] = {"area": None, "flip": 0.0, "jitter_p": 0.0, "grayscale": 0.0, "blur": 0.0}
EXACT = 1e-6  # far below 1/255: every byte is the same
SIZE = 40
NEAREST, BILINEAR = v2.InterpolationMode.NEAREST, v2.InterpolationMode.BILINEAR


def noise(count: int, size: int) -> Tensor:
    """uint8 [count, size, size, 3], which a view of `size` pixels shows as they are."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def positions_are_plain() -> bool:
    """Whether this machine's matrix product of float32, with which torchvision turns positions, fuses nothing."""
    a = torch.rand((1, 2000, 3), generator=torch.Generator().manual_seed(0)) - 0.5
    b = torch.rand((1, 3, 2), generator=torch.Generator().manual_seed(1)) - 0.5
    a[..., 2], b[:, 2] = 1.0, 0.0
    return torch.equal(a @ b, a[..., :1] * b[:, 0] + a[..., 1:2] * b[:, 1])


def bytes_of(spec: ViewSpec, images: Tensor, backend: str, **changes: Any) -> tuple[Tensor, Any]:
    """uint8 [N, 3, S, S] views of images of their size, and their parameters."""
    batch = DecodedBatch.from_images(list(images), index=range(len(images)))
    params = draw((spec,), batch.sizes, seed=5, epoch=1, index=batch.index)
    (views,) = ViewEngine((spec,), backend=backend)(batch, params)
    scaled = unnormalised(views) * 255
    assert (scaled - scaled.round()).abs().max() < 1e-3
    return scaled.round().to(torch.uint8), params.view(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("fill", [0.0, 255, None, (12.4, 200.6, 99.5)], ids=str)
def test_rotation_alone(backend: str, interpolation: Any, fill: Any) -> None:
    images = noise(24, SIZE)
    spec = ViewSpec(
        name="a", task="t", size=SIZE, rotate=180, rotate_interpolation=interpolation, rotate_fill=fill, **OFF
    )
    views, params = bytes_of(spec, images, backend)
    values = None if fill is None else list(fill) if isinstance(fill, tuple) else [fill] * 3
    mode = NEAREST if interpolation == "nearest" else BILINEAR
    expected = torch.stack(
        [
            F.rotate(image.permute(2, 0, 1), float(angle), interpolation=mode, fill=values)
            for image, angle in zip(images, params.angle, strict=True)
        ]
    )
    differ = views != expected
    assert (views != images.permute(0, 3, 1, 2)).any(dim=(1, 2, 3)).all()
    if positions_are_plain():
        assert not differ.any()
    else:  # positions differ in their last bit
        assert differ.double().mean() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("degrees", [-360, -270, -180, -90, 0, 90, 180, 270, 360])
def test_multiples_of_90_degrees_move_whole_pixels(backend: str, degrees: int) -> None:
    images = noise(3, SIZE)
    spec = ViewSpec(name="a", task="t", size=SIZE, rotate=(degrees, degrees), rotate_fill=77, quarter_turns=1.0, **OFF)
    views, params = bytes_of(spec, images, backend)
    for view, image, turns in zip(views, images, params.quarter_turns.tolist(), strict=True):
        assert torch.equal(view, torch.rot90(image.permute(2, 0, 1), turns + degrees // 90, (1, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_of_flips_and_turns(backend: str) -> None:
    images = noise(200, 8)
    spec = ViewSpec(
        name="a", task="t", size=8, vertical_flip=0.5, quarter_turns=1.0, blur_kernel=3, **(OFF | {"flip": 0.5})
    )
    views, params = bytes_of(spec, images, backend)
    seen = set()
    for n, image in enumerate(images):
        expected = image.permute(2, 0, 1)
        seen.add(decisions := (bool(params.flip[n]), bool(params.vertical_flip[n]), int(params.quarter_turns[n])))
        expected = F.horizontal_flip(expected) if decisions[0] else expected
        expected = F.vertical_flip(expected) if decisions[1] else expected
        assert torch.equal(views[n], F.rotate(expected, 90 * decisions[2])), decisions
    assert len(seen) == 16


@pytest.mark.parametrize("size", [8, 96, 224])
def test_after_the_crop_and_before_the_colours(size: int) -> None:
    """Hard images in torchvision's composition, with all operations on."""
    images = IMAGES[::5] if size == 224 else IMAGES[::2]
    turned: dict[str, Any] = {"vertical_flip": 0.5, "quarter_turns": 0.7, "rotate": (-20, 200)}
    spec = ViewSpec(
        name="a", task="t", size=size, jitter_p=1.0, blur=0.5, blur_kernel=5, solarize=0.5, cutout=(0.2, 0.4), **turned
    )
    if positions_are_plain():
        assert worst((spec,), seed=size, images=images) < FLOAT_BAR
    level = ViewSpec(name="b", task="t", size=size, quarter_turns=1.0, vertical_flip=0.5, **(OFF | {"area": (0.3, 1)}))
    assert worst((level,), seed=size, images=images) < EXACT


def test_off_is_what_it_was() -> None:
    specs = paper_views(size=32, local_size=16, blur_kernel=5)
    assert {(s.vertical_flip, s.quarter_turns, s.rotate) for s in specs} == {(0.0, 0.0, None)}
    params = draw(specs, torch.full((50, 2), 60), seed=0, epoch=0, index=range(50))
    for values in (params.vertical_flip, params.quarter_turns, params.angle):
        assert not values.any()


def test_cosine_and_sine() -> None:
    degrees = torch.linspace(-720, 720, 40_003, dtype=torch.float64)
    cosine, sine = portable_math.cosine_and_sine(degrees)
    for angle, c, s in zip(degrees.tolist(), cosine.tolist(), sine.tolist(), strict=True):
        assert abs(c - math.cos(math.radians(angle))) < 3e-15
        assert abs(s - math.sin(math.radians(angle))) < 3e-15
    cosine, sine = portable_math.cosine_and_sine(torch.tensor([0.0, 90, 180, 270, 360, -90], dtype=torch.float64))
    assert cosine.tolist() == [1, 0, -1, 0, 1, 0]
    assert sine.tolist() == [0, 1, 0, -1, 0, -1]
