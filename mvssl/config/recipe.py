"""Recipes: frozen, self-validating dataclasses with everything that determines the numbers of a run.

Settings that do not (folders, logging, how a step is executed) are in `mvssl.config.options`; those may change when a
run is resumed, a recipe only as `mvssl.runs.changes` says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from pipelines.checks import (
    Rule,
    at_least_zero,
    between,
    check_fields,
    check_types,
    fraction,
    is_finite,
    positive,
    ruled,
)
from pipelines.runtime import InputError, invalid
from pipelines.views.spec import LARGEST_SIDE, Interpolation, ViewSpec, check_views, tasks

Precision = Literal["auto", "fp32", "bf16", "fp16"]

# Above all real uses; what is larger is a mistake, or a recipe that is to exhaust memory or time.
LARGEST_BATCH = 1 << 20
_MOST_EPOCHS = 10**8
_MOST_IMAGES = 1 << 40
_WIDEST = 1 << 17
_MOST_LAYERS = 64
_MOST_PARAMETERS = 1 << 32  # of the hidden layers of all predictors
_LARGEST_K, _MOST_K = 1_000_000, 100


_THREE_FINITE = Rule(lambda x: all(map(is_finite, x)), "three numbers", "ImageNet's are (0.485, 0.456, 0.406)")
_THREE_POSITIVE = Rule(
    lambda x: all(is_finite(value) and value > 0 for value in x),
    "three numbers above 0",
    "ImageNet's are (0.229, 0.224, 0.225)",
)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The shared encoder: any timm model with pooled features.

    Attributes:
        name: timm's name of the architecture, such as resnet50.
        drop_path: stochastic depth rate of the online network (the target has none).
        freeze_stem: whether the first convolution (a vision transformer's patch embedding) keeps its initial weights.
        init: initialisation of timm (a ResNet's residual branches start at zero) or of the reference implementation
            (at full strength); they differ for ResNets and plain vision transformers.
        pos_embed: how a plain vision transformer's position embedding is interpolated to views of other sizes: timm
            (antialiased, to the exact size) or release (as the reference implementation, PAPER.md section 3).
        pretrained: known weights to start from: one of timm's tags of `name`, such as lvd142m or openai; true for its
            default tag; a full name such as vit_small_patch14_dinov2.lvd142m; hf-hub:USER/NAME; or local-dir:FOLDER
            with timm's config.json and model.safetensors. None for random weights.
        mean: of the images that the backbone takes (RGB of 0 to 1); views are ImageNet-normalised and converted before
            the first layer. None for that of the pretrained weights, or ImageNet's.
        std: the same for the standard deviation.
    """

    name: str = "resnet50"
    drop_path: float = ruled(
        Rule(lambda x: 0.0 <= x < 1.0, "at least 0 and below 1", "the paper's ViTs use 0.1"), default=0.0
    )
    freeze_stem: bool = False
    init: Literal["timm", "release"] = "timm"
    pos_embed: Literal["timm", "release"] = "timm"
    pretrained: str | bool | None = None
    mean: tuple[float, float, float] | None = ruled(_THREE_FINITE, default=None)
    std: tuple[float, float, float] | None = ruled(_THREE_POSITIVE, default=None)

    def __post_init__(self) -> None:
        if str(self.pretrained).lower() in ("true", "false", "default", "none"):  # words of Python, TOML and people
            wanted = str(self.pretrained).lower() in ("true", "default")
            object.__setattr__(self, "pretrained", "true" if wanted else None)
        check_fields(self)
        if self.pretrained is not None and not str(self.pretrained).strip():
            raise invalid("Backbone.pretrained", self.pretrained, "a tag or the name of weights", "give one, or true")


@dataclass(frozen=True, kw_only=True)
class Head:
    """An MLP head: hidden layers are Linear (no bias), norm, ReLU; the last is Linear with bias.

    Attributes:
        hidden: width of each hidden layer.
        out: width of the output.
        output_norm: whether a norm without affine parameters follows the last layer.
        norm: batch (as the paper) or layer, which is independent of other images, for tiny batches.
    """

    hidden: tuple[int, ...] = (4096,)
    out: int = 256
    output_norm: bool = False
    norm: Literal["batch", "layer"] = "batch"

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.hidden) > _MOST_LAYERS:
            raise InputError(
                f"Head.hidden has {len(self.hidden):,} layers but must have at most {_MOST_LAYERS}: leave some out.",
                field="Head.hidden",
            )
        for name, widths in (("hidden", self.hidden), ("out", (self.out,))):
            if any(not 1 <= width <= _WIDEST for width in widths):
                allowed = f"at least 1 wide and at most {_WIDEST:,}"
                raise invalid(f"Head.{name}", getattr(self, name), allowed, "the paper uses 4096 and 256")

    @property
    def parameters(self) -> int:
        """Weights between the hidden layers and of the last one, without those of the first."""
        return sum(before * after for before, after in pairwise((*self.hidden, self.out)))


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimiser and learning rate.

    Attributes:
        kind: lars, sgd or adamw.
        base_lr: learning rate for a batch of 256; the effective one is base_lr * batch_size / 256.
        bias_lr: the same for parameters with one dimension (biases, norm scales); None for base_lr.
        constant_predictor_lr: keep the predictors at the peak learning rate, without warm-up or cosine (SimSiam).
        lr_schedule: set learning rates and weight decay at every step or once per epoch.
        weight_decay: not applied to parameters with one dimension, except by sgd (PAPER.md section 5).
        weight_decay_end: weight decay at the end of the run, reached along a cosine; None for constant.
        momentum: of lars and sgd.
        betas: of adamw.
        eta: trust coefficient of lars.
        clip_grad_norm: maximal norm of the whole gradient; None for no clipping.
        warmup_epochs: epochs of linear warm-up from 0.
        final_lr_factor: last learning rate as a fraction of the effective one.
    """

    kind: Literal["lars", "sgd", "adamw"] = "lars"
    base_lr: float = positive(0.4)
    bias_lr: float | None = positive(None)
    constant_predictor_lr: bool = False
    lr_schedule: Literal["step", "epoch"] = "step"
    weight_decay: float = at_least_zero(1.5e-6)
    weight_decay_end: float | None = at_least_zero(None)
    momentum: float = fraction(0.9)
    betas: tuple[float, float] = ruled(
        Rule(lambda x: all(0.0 <= beta < 1.0 for beta in x), "two numbers in [0, 1)", "the paper uses (0.9, 0.98)"),
        default=(0.9, 0.98),
    )
    eta: float = positive(0.001)
    clip_grad_norm: float | None = positive(None)
    warmup_epochs: float = at_least_zero(10.0)
    final_lr_factor: float = fraction(0.001)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Online evaluation: kNN, and a linear probe on the same features.

    Attributes:
        every_epochs: epochs between two evaluations; 0 for none.
        resize: short side of resized images, in pixels.
        crop: side of their centre crop, in pixels.
        k: numbers of neighbours; the first one is reported first.
        temperature: votes weigh exp(similarity / temperature).
        max_train: maximal number of training images in the neighbour bank (evenly spaced); None for all.
        interpolation: of the resize; the reference implementation's is bilinear.
        probe: whether a linear classifier is fitted to the features, too; it costs 0.1 to 10 % of extracting them.
    """

    every_epochs: int = between(0, _MOST_EPOCHS, 10)
    resize: int = between(1, LARGEST_SIDE, 256)
    crop: int = between(1, LARGEST_SIDE, 224)
    k: tuple[int, ...] = ruled(
        Rule(
            lambda x: 1 <= len(x) <= _MOST_K and min(x) >= 1 and max(x) <= _LARGEST_K,
            f"one or more numbers of at least 1 and at most {_LARGEST_K:,}",
            f"the paper uses 10 and 20; there may be {_MOST_K}",
        ),
        default=(20, 10),
    )
    temperature: float = positive(0.07)
    max_train: int | None = between(1, _MOST_IMAGES, None)
    interpolation: Interpolation = "bicubic"
    probe: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.crop > self.resize:
            raise invalid("Evaluation.crop", self.crop, f"at most Evaluation.resize ({self.resize})", "lower it")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines the numbers of a run; `dataclasses.replace` makes variants.

    Attributes:
        name: of the recipe, or of the one it was derived from.
        method: byol, simsiam or mocov3 (the modules of `mvssl.methods`).
        views: the views of each image, in order.
        task_weights: weight of each task's loss; 1 if missing.
        predictors: per-view: one per task; shared: one for all, the paper's control.
        backbone: the encoder.
        projector: the projection head, shared by all views.
        predictor: the prediction head, one per task.
        optimizer: optimiser and learning rate.
        epochs: passes over the data set.
        batch_size: images per step over all ranks.
        order_chunk: consecutive images that are read as one block, for data that does not fit in memory on a disk with
            slow random access (see `pipelines.order.Order`); 0 shuffles all images.
        order_window: images of the shuffle buffer with order_chunk; memory has to hold twice as many encoded images.
        accumulate: gradient-accumulation micro-batches per rank; numerically equal to as many times the ranks (running
            statistics as on rank 0). BatchNorm statistics are per micro-batch; without BatchNorm the numbers are those
            of the whole batch. Stochastic depth is sampled for each micro-batch.
        target_decay: EMA momentum of the target network at step 0, rising to 1 along a cosine; unused by simsiam.
        temperature: of mocov3's InfoNCE; None for the other methods.
        sync_batchnorm: networks whose BatchNorm statistics are over the images of all ranks: none (as the paper),
            online, target or both.
        seed: of the order, the augmentation parameters and the initial weights.
        precision: auto is bf16 on CUDA and fp32 on the CPU.
        evaluation: online kNN and linear probe.
    """

    name: str
    method: str = "byol"
    views: tuple[ViewSpec, ...]
    task_weights: dict[str, float] = field(default_factory=dict)
    predictors: Literal["per-view", "shared"] = "per-view"
    backbone: Backbone = field(default_factory=Backbone)
    projector: Head = field(default_factory=Head)
    predictor: Head = field(default_factory=Head)
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = between(1, _MOST_EPOCHS, 200, "give the number of passes over the data")
    batch_size: int = between(2, LARGEST_BATCH, 1024, "BatchNorm needs two images or more")
    order_chunk: int = between(0, _MOST_IMAGES, 0)
    order_window: int = between(1, _MOST_IMAGES, 32_768)
    accumulate: int = 1
    target_decay: float = fraction(0.996)
    temperature: float | None = positive(None)
    sync_batchnorm: Literal["none", "online", "target", "both"] = "none"
    seed: int = ruled(Rule(lambda x: 0 <= x < 2**63, "between 0 and 2**63 - 1", "give another seed"), default=0)
    precision: Precision = "auto"
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        check_types(self, "Recipe.")
        check_views(self.views)
        known = tasks(self.views)
        for task, weight in self.task_weights.items():
            if task not in known:
                raise invalid("Recipe.task_weights", task, f"a task of the views {known}", "correct the name")
            if not (is_finite(weight) and weight >= 0):
                raise invalid(f"Recipe.task_weights[{task!r}]", weight, "0 or more", "give a weight")
        check_fields(self)
        if self.order_window < max(1, self.order_chunk):
            raise invalid(
                "Recipe.order_window",
                self.order_window,
                f"at least order_chunk ({self.order_chunk}) and 1",
                "enlarge the shuffle buffer, or shorten the blocks",
            )
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise invalid(
                "Recipe.accumulate",
                self.accumulate,
                f"a divisor of batch_size ({self.batch_size})",
                "give 1 or another one",
            )
        if self.optimizer.warmup_epochs > self.epochs:
            raise InputError(
                f"Optimizer.warmup_epochs is {self.optimizer.warmup_epochs:g} but must be at most the {self.epochs} "
                "epochs of the run: lower it or train longer.",
                field="Optimizer.warmup_epochs",
            )
        if self.predictor.out != self.projector.out:
            raise InputError(
                f"Head.out is {self.projector.out} for the projector and {self.predictor.out} for the predictor but "
                "must be the same, since predictions are compared with projections: set both alike.",
                field="Head.out",
            )

        slots = len(known) if self.predictors == "per-view" else 1
        if self.projector.parameters + slots * self.predictor.parameters > _MOST_PARAMETERS:
            raise InputError(
                f"Head.hidden is {self.projector.hidden} for the projector and {self.predictor.hidden} for "
                f"{slots} predictors, which are more than {_MOST_PARAMETERS:,} weights: make them narrower.",
                field="Head.hidden",
            )

    @property
    def learning_rate(self) -> float:
        """Effective peak learning rate: base_lr * batch_size / 256 (PAPER.md section 5)."""
        return self.optimizer.base_lr * self.batch_size / 256
