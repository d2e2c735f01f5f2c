"""Images that are hard to resize and recolour, and how far their views are from torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.implementations.torchvision_baseline import MEAN, STD, torchvision_view
from pipelines import DecodedBatch, ViewEngine, ViewSpec, draw
from pipelines.views.native.engine import native_obstacle


def unnormalised(view: Tensor) -> Tensor:
    """Back to [0, 1], in float64: [..., 3, S, S]."""
    return view.double() * torch.tensor(STD).double()[:, None, None] + torch.tensor(MEAN).double()[:, None, None]


def hard_images() -> list[Tensor]:
    """Images that make resizing and colour operations fail: uint8 [H, W, 3] each."""
    g = torch.Generator().manual_seed(0)

    def noise(height: int, width: int) -> Tensor:
        return torch.randint(0, 256, (height, width, 3), generator=g, dtype=torch.uint8)

    stripes = torch.zeros((151, 200, 3), dtype=torch.uint8)
    stripes[:, ::2] = 255
    rows = torch.zeros((90, 64, 3), dtype=torch.uint8)
    rows[1::2] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    checks = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).to(torch.uint8)[..., None].repeat(1, 1, 3)
    primaries = torch.tensor([[r, g_, b] for r in (0, 255) for g_ in (0, 255) for b in (0, 255)], dtype=torch.uint8)
    blocks = primaries.reshape(2, 4, 3).repeat_interleave(40, 0).repeat_interleave(30, 1)
    ramp = torch.arange(256, dtype=torch.uint8)[:, None, None].repeat(1, 256, 3)
    nearly_gray = ramp.clone()
    nearly_gray[..., 1] ^= 1  # one level between channels: hue is at its most fragile
    y, x = torch.meshgrid(torch.arange(400), torch.arange(300), indexing="ij")
    smooth = torch.stack((x * 255 // 299, y * 255 // 399, (x + y) * 255 // 698), dim=-1).to(torch.uint8)
    flat = [torch.full((40, 50, 3), value, dtype=torch.uint8) for value in (0, 128, 255)]
    sizes = [(1, 1), (8, 8), (1, 300), (300, 1), (6, 400), (400, 6), (224, 224), (333, 500), (700, 520)]
    return [stripes, rows, checks, blocks, ramp, nearly_gray, smooth, *flat, *(noise(*size) for size in sizes)]


IMAGES = hard_images()
FLOAT_BAR = 1e-5  # of values in [0, 1], i.e. before normalisation


BACKENDS = ("reference", "native") if native_obstacle() is None else ("reference",)


def worst(specs: tuple[ViewSpec, ...], *, seed: int, images: Sequence[Tensor] = IMAGES) -> float:
    """Largest difference of any pixel of any view of the images, by any backend of the CPU, in units of [0, 1]."""
    batch = DecodedBatch.from_images(images, index=range(len(images)))
    params = draw(specs, batch.sizes, seed=seed, epoch=0, index=batch.index)
    made = [ViewEngine(specs, backend=backend)(batch, params) for backend in BACKENDS]
    difference = 0.0
    for v, spec in enumerate(specs):
        theirs = torch.stack([torchvision_view(image, spec, params.view(v), n) for n, image in enumerate(images)])
        for views in made:
            assert views[v].shape == theirs.shape
            difference = max(difference, (unnormalised(views[v]) - unnormalised(theirs)).abs().max().item())
    return difference
