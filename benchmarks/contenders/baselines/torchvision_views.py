"""One view of one image as a composition of torchvision.transforms.v2 functions, for the same decisions.

What people use today, image by image; also what the parity tests compare our engine with.
"""

from __future__ import annotations

from typing import cast

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
    """The view of `image` (uint8 [H, W, 3]) by the decisions for image n of one view: float32 [3, S, S], normalised.

    The image may lie on a GPU, the decisions lie on the CPU.
    """
    top, left, height, width = params.crop[n].tolist()
    view = F.resized_crop(
        image.permute(2, 0, 1), top, left, height, width, [spec.size] * 2, interpolation=BICUBIC, antialias=True
    )
    if params.flip[n]:
        view = F.horizontal_flip(view)
    view = F.to_dtype(view, torch.float32, scale=True)
    i, j, h, w = params.cutout[n].tolist()
    if h > 0:
        view = F.erase(view, i, j, h, w, torch.tensor(MEAN, device=view.device)[:, None, None])
    if params.jitter_on[n]:
        for number in params.jitter_order[n].tolist():
            view = JITTER[number](view, float(params.jitter[n, number]))
    if params.gray[n]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if params.blur_sigma[n] > 0:
        view = F.gaussian_blur(view, [spec.blur_kernel] * 2, [float(params.blur_sigma[n])] * 2)
    if params.solarize[n]:
        view = F.solarize(view, spec.solarize_threshold)
    return cast(Tensor, F.normalize(view, list(MEAN), list(STD)))
