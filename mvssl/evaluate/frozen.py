"""A trained backbone to use: frozen, with the transform that its images need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from mvssl.config.device import resolve_device
from mvssl.config.evaluation import BackboneSource, Network
from mvssl.config.recipe import Evaluation
from mvssl.evaluate.features import Features, extract_features
from mvssl.evaluate.session import Session
from mvssl.models.backbones import feature_width
from mvssl.weights.load import LoadedBackbone
from mvssl.weights.load import load_backbone as load_source
from mvssl.weights.timm_folder import WEIGHTS
from pipelines.batch import DecodedBatch
from pipelines.checks import brief, typed
from pipelines.decode.pillow import decode_one
from pipelines.files import given_path
from pipelines.loading.deep_images import state_value_range
from pipelines.runtime import InputError, invalid
from pipelines.storage.given import source_of
from pipelines.storage.items import NoImage, encoded, image_of
from pipelines.value_range import ValueRange, parse_value_range
from pipelines.views.reference.center import center_views
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, Interpolation


@dataclass(frozen=True, kw_only=True)
class Transform:
    """What evaluations do with an image: its short side resized, the centre cropped, normalised. May be pickled.

    Attributes:
        resize: the short side becomes this many pixels.
        crop: side of the centre crop in pixels.
        interpolation: of the resize, antialiased.
        mean, std: of the normalisation, for RGB values of 0 to 1.
        value_range: of images of more than 8 bits; None if they use 16.
    """

    resize: int
    crop: int
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    value_range: ValueRange | None = None

    def __call__(self, image: object) -> Tensor:
        """One image, float32 [3, crop, crop].

        Args:
            image: of Pillow, pixels uint8 [H, W, C] or [C, H, W], encoded bytes, or a path.

        Raises:
            InputError: it is something else, or cannot be read or decoded.
        """
        try:
            pixels = decode_one(encoded(image_of(image)), value_range=self.value_range)
        except NoImage as error:
            raise InputError(f"image is {error}.", field="image") from error
        except OSError as error:
            raise InputError(f"image cannot be read: {error.strerror or error} ({error.filename}).") from error
        if isinstance(pixels, str):
            raise InputError(f"image cannot be decoded ({pixels}): give another one.", field="image")
        batch = DecodedBatch.from_images([np.array(pixels)], index=[0])
        return center_views(batch, resize=self.resize, crop=self.crop, interpolation=self.interpolation)[0]


class FrozenBackbone(nn.Module):
    """A trained backbone: images as `transform` makes them, float32 [B, 3, S, S], to features [B, D].

    It stays in eval mode, also after `train()`, and its parameters need no gradients.

    Attributes:
        transform: makes of an image what the backbone takes.
        feature_dim: D.
        architecture: timm's name.
        about: where the weights come from.
    """

    def __init__(self, loaded: LoadedBackbone) -> None:
        super().__init__()
        evaluation = loaded.evaluation
        self.backbone = loaded.backbone.requires_grad_(False)
        self.transform = Transform(
            resize=evaluation.resize,
            crop=evaluation.crop,
            interpolation=evaluation.interpolation,
            value_range=_value_range(loaded),
        )
        self.feature_dim = feature_width(loaded.backbone, [evaluation.crop], name=loaded.architecture)
        self.architecture = loaded.architecture
        self.about = loaded.about or loaded.name
        self._evaluation: Evaluation = evaluation
        self.eval()

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of the normalisation, for RGB values of 0 to 1."""
        return self.transform.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of the normalisation."""
        return self.transform.std

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S], normalised, to [B, D].

        Raises:
            InputError: images are no such tensor.
        """
        is_tensor: bool = isinstance(images, Tensor)
        if not is_tensor or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            what = f"a tensor of {str(images.dtype)[6:]} {list(images.shape)}" if is_tensor else brief(images)
            raise InputError(
                f"images is {what} but must be a float tensor [B, 3, S, S], normalised: make them with transform, and "
                "give one image as backbone(backbone.transform(image)[None]).",
                field="images",
            )
        features: Tensor = self.backbone(images)
        return features

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Does nothing: BatchNorm's statistics and weights stay as they are."""
        super().train(False)
        return self

    def features(
        self, data: object, *, batch_size: int = 64, progress: Callable[[int], None] | None = None
    ) -> Features:
        """Features of many images, read and decoded in threads while the backbone computes; as mvssl-features.

        Args:
            data: the images in any form that `mvssl.train` takes.
            batch_size: images per forward.
            progress: called with the number of images done.

        Returns:
            values float32 [N, D] and labels int64 [N] (-1 for none) on the backbone's device, and index int64 [N].
            Images that cannot be decoded are named in a warning and left out.
        """
        source = source_of(data)
        try:
            state_value_range(source, None, default=self.transform.value_range)
            device = next(self.backbone.parameters()).device
            session = Session(device=device, batch_size=batch_size)
            with torch.no_grad():
                return extract_features(session, self.backbone, source, self._evaluation, progress=progress)
        finally:
            source.close()


@typed
def load_backbone(
    path: str | Path,
    *,
    network: Network | None = None,
    checkpoint: str | int = "last",
    arch: str | None = None,
    resize: int | None = None,
    crop: int | None = None,
    interpolation: Interpolation | None = None,
    device: str | torch.device = "cpu",
) -> FrozenBackbone:
    """A trained backbone, frozen and in eval mode, with the transform of its images.

    Args:
        path: a run folder, or one of its checkpoints; a file of weights (exported, a checkpoint of the reference
            implementation, MoCo, SimSiam or DINO, weights of timm or torchvision); or a folder as timm takes it
            (config.json, model.safetensors).
        network: "online" or "target", where there are both; by default the one that its project evaluates.
        checkpoint: of a run: "last", "best" (by the online kNN or probe), or a step that is kept.
        arch: timm's name of the architecture, if neither the file nor its tensors tell it.
        resize: the short side becomes this many pixels; by default the run's, or 256.
        crop: side of the centre crop in pixels; by default the run's, or 224.
        interpolation: of the resize: bicubic or bilinear; by default the run's, or bicubic.
        device: where the backbone is; auto takes CUDA if available.

    Raises:
        InputError: the path does not exist, is damaged or of an unknown format, or fits no architecture.
    """
    where = given_path(path, "path").expanduser()
    if not where.exists():
        raise InputError(
            f"path is {str(where)!r}, which does not exist: give a run folder, a file of weights, or timm's folder.",
            field="path",
        )
    if network not in (None, *get_args(Network)):
        raise invalid("network", network, "online or target", "choose one of these")
    for name, pixels in (("resize", resize), ("crop", crop)):
        if pixels is not None and pixels < 1:
            raise invalid(name, pixels, "1 pixel or more", "leave it out for the run's own")
    if where.parent.name == "checkpoints" and (where / "checkpoint.json").is_file() and checkpoint == "last":
        where = where.resolve()  # what `TrainState.checkpoint` names, or checkpoints/best
        checkpoint, where = where.name, where.parent.parent
    is_run = where.is_dir() and not (where / WEIGHTS).is_file()
    source = BackboneSource(
        run=where if is_run else None,
        weights=None if is_run else where,
        network=network,
        checkpoint=str(checkpoint),
        arch=arch,
        resize=resize,
        crop=crop,
        interpolation=interpolation,
    )
    return FrozenBackbone(load_source(source)).to(resolve_device(str(device), local_rank=None))


def _value_range(loaded: LoadedBackbone) -> ValueRange | None:
    """The range of values of a run's images; None if it is of no run, or needed none."""
    text = None if loaded.folder is None else loaded.folder.options().get("value_range")
    return None if text is None else parse_value_range(text)
