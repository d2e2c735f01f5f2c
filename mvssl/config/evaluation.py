"""What an evaluation is asked for: a backbone, images, where and how it is computed, and the settings of each probe.

Nothing here imports torch: the commands' help needs these classes alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mvssl.config.recipe import LARGEST_BATCH
from pipelines.checks import Rule, at_least, at_least_zero, between, check_fields, positive, ruled
from pipelines.decode import DecoderName, ImageLimits
from pipelines.decode.base import MOST_THREADS
from pipelines.loading import Cache
from pipelines.names import located
from pipelines.runtime import InputError, invalid
from pipelines.storage.remote_files import RemoteOptions
from pipelines.value_range import parse_value_range
from pipelines.views.spec import Interpolation

Network = Literal["online", "target"]
"""A network of a run, or of a checkpoint that has both."""
_NOT_EMPTY = Rule(bool, "one or more numbers", "give the values of the grid")
_MIN_STEPS = 32  # of the fast linear probe, per epoch


@dataclass(frozen=True, kw_only=True)
class BackboneSource:
    """Which backbone to load: that of a run, or of a file.

    Attributes:
        run: a run folder.
        weights: a file instead: an exported backbone, a checkpoint of the reference implementation, MoCo, SimSiam or
            DINO, weights of timm or torchvision, or a folder as timm takes it (config.json, model.safetensors).
        checkpoint: of the run: last, best (checkpoints/best), or a step that is kept, such as 1200.
        network: online or target, where the file has both; by default the one that its project evaluates.
        arch: timm's name of the file's architecture, if neither the file nor its tensors tell it. With a tag, such as
            vit_base_patch16_224.augreg_in21k, images are normalised as those weights expect.
        untrained: the run's initial weights instead, or a random `arch`, as a baseline.
        resize: length in pixels to which the short side is resized; by default the run's, or 256.
        crop: side in pixels of the centre crop that follows; by default the run's, or 224.
        interpolation: of the resize and of random crops: bicubic or bilinear; by default bilinear with --protocol
            release, else the run's, or bicubic.
    """

    run: Path | None = None
    weights: Path | None = None
    checkpoint: str = "last"
    network: Network | None = None
    arch: str | None = None
    untrained: bool = False
    resize: int | None = None
    crop: int | None = None
    interpolation: Interpolation | None = None

    def __post_init__(self) -> None:
        check_fields(self, with_class=False)
        if self.run is None and self.weights is None and not (self.untrained and self.arch):
            raise InputError(
                "no backbone is named: give a run folder with --run, a file with --weights, or a random network with "
                "--untrained --arch NAME."
            )
        if self.untrained and (self.weights is not None or self.network is not None):
            raise InputError(
                "untrained excludes weights and network: leave --untrained out, or --weights and --network."
            )
        if self.checkpoint != "last" and (self.run is None or self.untrained or self.weights is not None):
            raise InputError(
                f"checkpoint is {self.checkpoint!r} but needs a run, and excludes weights and untrained: name the run "
                "with --run, or leave --checkpoint out.",
                field="checkpoint",
            )
        if self.weights is None and self.run is not None and self.arch is not None:
            raise InputError(f"arch is {self.arch!r} but the run's recipe names its architecture: leave --arch out.")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where and how features are computed.

    Attributes:
        device: auto takes CUDA if available.
        decoder: auto takes DALI if installed.
        threads: decoder threads.
        precision: number format of the backbone; auto is bf16 on CUDA and fp32 on the CPU.
        extract_batch: images per forward of the frozen backbone.
        value_range: MIN..MAX of the values of images with more than 8 bits, such as 0..4095 for 12 bits in files of 16;
            by default that of the run or of converted data.
        limits: images beyond these limits are bad images.
        remote: how data at a URL are read and cached.
    """

    device: str = "auto"
    decoder: DecoderName = "auto"
    threads: int | None = between(1, MOST_THREADS, None)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    extract_batch: int = between(1, LARGEST_BATCH, 256)
    value_range: str | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)
    remote: RemoteOptions = field(default_factory=RemoteOptions)

    def __post_init__(self) -> None:
        check_fields(self, with_class=False)
        if self.value_range is not None:
            parse_value_range(self.value_range)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Images and result folder of an evaluation.

    Attributes:
        data: labelled images; by default those of the run. Its train/ and val/ are used where they exist.
        val: images to measure on; by default DATA/val, or the run's --val.
        out: folder for results and cached features; by default RUN/eval.
        overwrite: replace existing results of other data or settings.
    """

    data: Path | None = None
    val: Path | None = None
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self, with_class=False)
        for name in ("data", "val"):
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, located(path))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Hyperparameters of one classifier.

    Attributes:
        lr: peak learning rate, not scaled by the batch size.
        weight_decay: L2 penalty weight_decay / 2 * |W|^2 on weights, not on biases.
    """

    lr: float = positive(0.005)
    weight_decay: float = at_least_zero(0.0)

    def __post_init__(self) -> None:
        check_fields(self, with_class=False)


@dataclass(frozen=True, kw_only=True)
class FastLinear:
    """A linear classifier on cached features, the best of a grid.

    Attributes:
        lr: peak learning rates of the grid, not scaled by the batch size.
        weight_decay: weight decays of the grid.
        epochs: passes over the features.
        batch_size: images per step; at most a 32nd of the training images, so that small data gets enough steps.
        drawn: random resized crops of each training image, in addition to its centre crop.
        held_out: fraction of the training images on which the settings are compared.
        seed: of order, crops and held-out images.
    """

    lr: tuple[float, ...] = ruled(_NOT_EMPTY, default=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2))
    weight_decay: tuple[float, ...] = ruled(_NOT_EMPTY, default=(0.0, 1e-4, 1e-3, 1e-2))
    epochs: int = at_least(1, 100)
    batch_size: int = between(1, LARGEST_BATCH, 512)
    drawn: int = between(0, 10_000, 0)
    held_out: float = ruled(Rule(lambda x: 0 < x < 1, "between 0 and 1", "0.1 is usual"), default=0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, with_class=False)
        self.grid()

    def batch_for(self, images: int) -> int:
        """Batch size for this many training images."""
        return min(self.batch_size, max(1, images // _MIN_STEPS))

    def grid(self) -> list[Setting]:
        """All settings."""
        return [Setting(lr=lr, weight_decay=decay) for lr in self.lr for decay in self.weight_decay]


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """How a classifier is trained: random resized crop and flip, cross-entropy, cosine learning-rate schedule.

    Attributes:
        epochs: passes over the labelled images.
        batch_size: images per step, over all ranks.
        optimizer: sgd or adamw.
        lr: peak learning rate, not scaled by the batch size.
        momentum: of sgd.
        weight_decay: of parameters with two or more dimensions.
        layer_decay: factor on the learning rate from each layer of the backbone to the one below; 1 for equal rates.
        warmup_epochs: epochs of linear warm-up from 0.
        mixup: alpha of mixup's Beta distribution; 0 disables it.
        label_smoothing: probability mass spread over all classes.
        head_std: standard deviation of the linear layer's initial weights; 0 starts at zero.
        seed: of the order, the augmentation and the linear layer.
        cache: where decoded images are cached, as in mvssl-train.
    """

    epochs: int = at_least(1, 100)
    batch_size: int = between(1, LARGEST_BATCH, 512)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = positive(0.005)
    momentum: float = 0.9
    weight_decay: float = at_least_zero(0.0)
    layer_decay: float = ruled(
        Rule(lambda x: 0 < x <= 1, "above 0 and at most 1", "0.75 is usual for transformers"), default=1.0
    )
    warmup_epochs: float = at_least_zero(0.0)
    mixup: float = at_least_zero(0.0)
    label_smoothing: float = ruled(Rule(lambda x: 0 <= x < 1, "at least 0 and below 1", "0.1 is usual"), default=0.0)
    head_std: float = at_least_zero(0.0)
    seed: int = 0
    cache: Cache = "off"

    def identity(self) -> dict[str, Any]:
        """The settings, for identities; a start at zero is left out, as identities of earlier versions lack it."""
        return {name: value for name, value in asdict(self).items() if name != "head_std" or value}

    def __post_init__(self) -> None:
        check_fields(self, with_class=False)
        if self.warmup_epochs >= self.epochs:
            raise invalid("warmup_epochs", self.warmup_epochs, f"below the {self.epochs} epochs", "shorten it")


RELEASE = Supervision(head_std=0.01)
"""The reference implementation's probe, which resizes bilinearly too (`BackboneSource.interpolation`)."""
FINETUNING = Supervision(epochs=30, batch_size=256, lr=0.05, weight_decay=1e-4)
"""Default settings of fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class LabelSubset:
    """Which labels are used.

    Attributes:
        labels: fraction of the images of each class, sampled at random.
        label_list: a text file that names the images instead, one per line, such as SimCLR's lists of ImageNet.
        label_seed: of the sample.
    """

    labels: float = 1.0
    label_list: Path | None = None
    label_seed: int = 0

    def __post_init__(self) -> None:
        if self.label_list is not None and self.labels != 1.0:
            raise InputError("labels and label_list exclude each other: give one of --labels and --label-list.")

    def name(self) -> str:
        """Part of the result's file name: the percentage, or the name of the list."""
        return f"{100 * self.labels:g}pct" if self.label_list is None else self.label_list.stem
