"""One view of one image as a composition of torchvision.transforms.v2 functions, for the same decisions."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pipelines.views.params import ViewParams
from pipelines.views.spec import ViewSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = v2.InterpolationMode.BICUBIC
JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def torchvision_view(image: Tensor, spec: ViewSpec, params: ViewParams, n: int) -> Tensor:
    """The view of `image` (uint8 [H, W, 3]) by the decisions for image n of one view: float32 [3, S, S], normalised."""
    top, left, height, width = params.crop[n].tolist()
    view = F.resized_crop(
        image.permute(2, 0, 1), top, left, height, width, [spec.size] * 2, interpolation=BICUBIC, antialias=True
    )
    if params.flip[n]:
        view = F.horizontal_flip(view)
    view = F.to_dtype(view, torch.float32, scale=True)
    i, j, h, w = params.cutout[n].tolist()
    if h > 0:
        view = F.erase(view, i, j, h, w, torch.tensor(MEAN)[:, None, None])
    if params.jitter_on[n]:
        for number in params.jitter_order[n].tolist():
            view = JITTER[number](view, float(params.jitter[n, number]))
    if params.gray[n]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if params.blur_sigma[n] > 0:
        view = F.gaussian_blur(view, [spec.blur_kernel] * 2, [float(params.blur_sigma[n])] * 2)
    if params.solarize[n]:
        view = F.solarize(view, spec.solarize_threshold)
    return F.normalize(view, list(MEAN), list(STD))


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
