"""Loaders of other libraries, for the same views as far as each can make them, each in a DataLoader as it prescribes.

    pip install lightly lightly-train stable-pretraining kornia && pip install --no-deps solo-learn einops

Each decodes and transforms with its own code. They sample their own parameters, in the recipe's ranges; what they leave
out or do otherwise is in `what`, which the result keeps. None is installed with this project.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.runtime import InputError
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

MakeViews = Callable[[np.ndarray], list[Tensor]]
"""From an image's file, uint8 [bytes], to its V views, float32 [3, S, S], normalised."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library that takes part.

    Attributes:
        package: its name on the package index.
        make: a function that makes the views of an image in a worker process.
        what: what its views have that ours do not, and what they lack.
    """

    package: str
    make: Callable[[Sequence[ViewSpec]], MakeViews]
    what: str

    def version(self) -> str:
        """The installed version.

        Raises:
            InputError: it is not installed.
        """
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            raise InputError(f"{self.package} is not installed: pip install {self.package} to measure it.") from None


def _open(data: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(data.tobytes())).convert("RGB")


def lightly_train_views(specs: Sequence[ViewSpec]) -> MakeViews:
    """Albumentations on arrays decoded by torchvision, as lightly-train does for local JPEGs and PNGs."""
    view = importlib.import_module("lightly_train._transforms.view_transform")
    options = importlib.import_module("lightly_train._transforms.transform")
    from torchvision.io import ImageReadMode, decode_image

    def transform(spec: ViewSpec) -> Any:
        low, high = spec.area or (1.0, 1.0)
        brightness, contrast, saturation, hue = spec.jitter
        jitter = options.ColorJitterArgs(
            prob=spec.jitter_p, strength=1.0, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
        )
        blur = options.GaussianBlurArgs(prob=spec.blur, sigmas=spec.blur_sigma, blur_limit=0)
        solarize = options.SolarizeArgs(prob=spec.solarize, threshold=spec.solarize_threshold)
        arguments = view.ViewTransformArgs(
            image_size=(spec.size, spec.size),
            channel_drop=None,
            random_resized_crop=None
            if spec.area is None
            else options.RandomResizedCropArgs(min_scale=low, max_scale=high),
            random_flip=options.RandomFlipArgs(horizontal_prob=spec.flip, vertical_prob=0.0),
            random_rotation=None,
            color_jitter=jitter if spec.jitter_p > 0 else None,
            random_gray_scale=spec.grayscale or None,
            gaussian_blur=blur if spec.blur > 0 else None,
            solarize=solarize if spec.solarize > 0 else None,
            normalize=options.NormalizeArgs(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        )
        return view.ViewTransform(arguments)

    transforms = [transform(spec) for spec in specs]

    def make(data: np.ndarray) -> list[Tensor]:
        pixels = decode_image(torch.from_numpy(data), mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
        return [each({"image": pixels})["image"] for each in transforms]

    return make


def lightly_views(specs: Sequence[ViewSpec]) -> MakeViews:
    """DINOViewTransform, the one of lightly's that takes a crop's whole range, on Pillow's images."""
    module = importlib.import_module("lightly.transforms.dino_transform")

    def transform(spec: ViewSpec) -> Any:
        brightness, contrast, saturation, hue = spec.jitter
        return module.DINOViewTransform(
            crop_size=spec.size,
            crop_scale=spec.area or (1.0, 1.0),
            hf_prob=spec.flip,
            cj_prob=spec.jitter_p,
            cj_strength=1.0,
            cj_bright=brightness,
            cj_contrast=contrast,
            cj_sat=saturation,
            cj_hue=hue,
            random_gray_scale=spec.grayscale,
            gaussian_blur=spec.blur,
            sigmas=spec.blur_sigma,
            solarization_prob=spec.solarize,
        )

    return _views_by([transform(spec) for spec in specs])


def _views_by(transforms: Sequence[Callable[[Any], Tensor]]) -> MakeViews:
    """One view by each transform of a decoded image."""

    def make(data: np.ndarray) -> list[Tensor]:
        image = _open(data)
        return [each(image) for each in transforms]

    return make


def solo_views(specs: Sequence[ViewSpec]) -> MakeViews:
    """ImagenetTransform of solo-learn, on Pillow's images."""
    module = part_of("solo", "utils/pretrain_dataloader.py")

    def transform(spec: ViewSpec) -> Any:
        brightness, contrast, saturation, hue = spec.jitter
        low, high = spec.area or (1.0, 1.0)
        return module.ImagenetTransform(
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            color_jitter_prob=spec.jitter_p,
            gray_scale_prob=spec.grayscale,
            horizontal_flip_prob=spec.flip,
            gaussian_prob=spec.blur,
            solarization_prob=spec.solarize,
            min_scale=low,
            max_scale=high,
            crop_size=spec.size,
        )

    return _views_by([transform(spec) for spec in specs])


def stable_views(specs: Sequence[ViewSpec]) -> MakeViews:
    """A composition of stable-pretraining's transforms, in the order of its BYOL example, on Pillow's images."""
    module = importlib.import_module("stable_pretraining.data.transforms")

    def transform(spec: ViewSpec) -> Any:
        brightness, contrast, saturation, hue = spec.jitter
        steps = [
            module.RGB(),
            module.RandomResizedCrop((spec.size, spec.size), scale=spec.area or (1.0, 1.0)),
            module.RandomHorizontalFlip(p=spec.flip),
            module.ColorJitter(
                brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, p=spec.jitter_p
            ),
            module.RandomGrayscale(p=spec.grayscale),
            module.PILGaussianBlur(sigma=spec.blur_sigma, p=spec.blur),
            module.RandomSolarize(threshold=spec.solarize_threshold * 255, p=spec.solarize),
            module.ToImage(mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD)),
        ]
        return module.Compose(*steps)

    transforms = [transform(spec) for spec in specs]

    def make(data: np.ndarray) -> list[Tensor]:
        image = _open(data)
        return [each({"image": image})["image"] for each in transforms]

    return make


def part_of(package: str, file: str) -> ModuleType:
    """One module of an installed package, without its `__init__`, which may need versions of other packages.

    Raises:
        InputError: there is no such file.
    """
    found = importlib.util.find_spec(package)
    places = [] if found is None else list(found.submodule_search_locations or ())
    for place in places:
        name = f"{package}_{file.removesuffix('.py').replace('/', '_')}"
        spec = importlib.util.spec_from_file_location(name, f"{place}/{file}")
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module
    raise InputError(f"{package} has no {file} here: install its package to measure it.")


_EIGHT_BITS = "8-bit between the operations, so cheaper and coarser pixels; no cutout"

PEERS: dict[str, Peer] = {
    "lightly-train": Peer(
        package="lightly-train",
        make=lightly_train_views,
        what=f"albumentations and OpenCV, resize by area; {_EIGHT_BITS}",
    ),
    "lightly": Peer(package="lightly", make=lightly_views, what=f"Pillow, bilinear, box-filter blur; {_EIGHT_BITS}"),
    "solo-learn": Peer(
        package="solo-learn", make=solo_views, what=f"Pillow, bicubic, box-filter blur, flip last; {_EIGHT_BITS}"
    ),
    "stable-pretraining": Peer(
        package="stable-pretraining", make=stable_views, what=f"Pillow, bilinear, box-filter blur; {_EIGHT_BITS}"
    ),
}
"""The libraries by the names of their rows."""
