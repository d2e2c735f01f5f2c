"""Views as a composition of kornia.augmentation, which works on float batches, on the CPU or a GPU: a baseline.

kornia is no dependency of this project; install it to measure it. It samples its own augmentation parameters in the
same ranges, with these differences. A crop takes images of one size only, so it is called image by image, and it is
bicubic without antialiasing, which is less work than ours. The cutout's box is filled with one gray value, the mean of
ImageNet's three. The jitter has one order of operations for the whole batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.batch import DecodedBatch
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

kornia: Any = importlib.import_module("kornia.augmentation")  # Any: not installed where types are checked


def kornia_views(
    specs: Sequence[ViewSpec], *, device: torch.device, dtype: torch.dtype
) -> Callable[[Sequence[DecodedBatch]], Iterator[list[Tensor]]]:
    """A function from batches on `device` to an iterator over one [N, 3, S, S] per spec, normalised, in `dtype`."""
    pairs = [(_crop(spec).to(device), _photometric(spec).to(device)) for spec in specs]

    def make(batches: Sequence[DecodedBatch]) -> Iterator[list[Tensor]]:
        for batch in batches:
            images = [batch.image(n).permute(2, 0, 1)[None].float() / 255.0 for n in range(len(batch))]  # [1, 3, H, W]
            yield [rest(torch.cat([crop(image) for image in images])).to(dtype) for crop, rest in pairs]

    return make


def _crop(spec: ViewSpec) -> nn.Module:
    """Random resized crop of float images [1, 3, H, W] to [1, 3, S, S]."""
    size = (spec.size, spec.size)
    how = {"resample": "bicubic", "align_corners": False}
    if spec.area is None:
        crop: nn.Module = kornia.Resize(size, **how)
    else:
        crop = kornia.RandomResizedCrop(size, scale=spec.area, ratio=spec.ratio, **how)
    return nn.Sequential(crop, nn.Hardtanh(0.0, 1.0))  # bicubic overshoots


def _photometric(spec: ViewSpec) -> nn.Module:
    """Everything after the crop, on batches [N, 3, S, S] in [0, 1]."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    steps = [kornia.RandomHorizontalFlip(p=spec.flip), kornia.RandomVerticalFlip(p=spec.vertical_flip)]
    if spec.quarter_turns > 0:
        steps.append(kornia.RandomRotation90(times=(0, 3), p=spec.quarter_turns))
    if spec.degrees != (0, 0):
        steps.append(kornia.RandomRotation(spec.degrees, resample=spec.rotate_interpolation, p=1.0))  # fills with 0
    if spec.cutout is not None:
        fill = float(mean.mean())
        steps.append(kornia.RandomErasing(scale=spec.cutout, ratio=spec.cutout_ratio, value=fill, p=1.0))
    steps += [kornia.ColorJitter(*spec.jitter, p=spec.jitter_p), kornia.RandomGrayscale(p=spec.grayscale)]
    if spec.blur > 0:
        steps.append(kornia.RandomGaussianBlur((spec.blur_kernel, spec.blur_kernel), spec.blur_sigma, p=spec.blur))
    if spec.solarize > 0:
        threshold = (spec.solarize_threshold, spec.solarize_threshold)
        steps.append(kornia.RandomSolarize(thresholds=threshold, additions=(0.0, 0.0), p=spec.solarize))
    return nn.Sequential(*steps, kornia.Normalize(mean=mean, std=std))
