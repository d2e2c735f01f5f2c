"""A recipe: everything that decides the numbers of a run, in frozen dataclasses that check themselves.

What a run merely does on the side (folders, logging, how often to save) is in `mvssl.config.options` and may change
between a run and its resumption; a recipe may not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pipelines.runtime import InputError, invalid
from pipelines.views.spec import ViewSpec, check_views, tasks


def _positive(owner: object, *names: str) -> None:
    """Raise InputError unless each named field is a finite number above 0."""
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value > 0):
            raise invalid(f"{type(owner).__name__}.{name}", value, "a number above 0", "give a positive value")


def _at_least_zero(owner: object, *names: str) -> None:
    """Raise InputError unless each named field is a finite number, 0 or more."""
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value >= 0):
            raise invalid(f"{type(owner).__name__}.{name}", value, "0 or more", "give a value that is not negative")


def _fraction(owner: object, *names: str) -> None:
    """Raise InputError unless each named field lies in [0, 1]."""
    for name in names:
        value = getattr(owner, name)
        if not 0.0 <= value <= 1.0:
            raise invalid(f"{type(owner).__name__}.{name}", value, "between 0 and 1", "give a fraction")


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The shared encoder, any timm model that gives pooled features.

    Attributes:
        name: timm's name of the architecture, e.g. resnet50.
        drop_path: stochastic depth rate of the online network (the target has none).
        freeze_stem: whether the first convolution (a vision transformer's patch embedding) keeps its initial weights.
        init: how initial weights are drawn: as timm does (a ResNet's residual branches begin at zero), or as the
            paper's release (at full strength), which differs for ResNets and plain vision transformers.
    """

    name: str = "resnet50"
    drop_path: float = 0.0
    freeze_stem: bool = False
    init: Literal["timm", "release"] = "timm"

    def __post_init__(self) -> None:
        if self.init not in ("timm", "release"):
            raise invalid("Backbone.init", self.init, "timm or release", "choose one; the paper's recipes use release")
        if not 0.0 <= self.drop_path < 1.0:
            raise invalid("Backbone.drop_path", self.drop_path, "at least 0 and below 1", "the paper's ViTs use 0.1")


@dataclass(frozen=True, kw_only=True)
class Head:
    """An MLP head: hidden layers are Linear (no bias), norm, ReLU; the last is Linear with bias.

    Attributes:
        hidden: width of each hidden layer.
        out: width of the output.
        output_norm: whether a norm without affine parameters follows the last layer.
        norm: batch (the paper's) or layer, which needs no other images: for gradient accumulation and tiny batches.
    """

    hidden: tuple[int, ...] = (4096,)
    out: int = 256
    output_norm: bool = False
    norm: Literal["batch", "layer"] = "batch"

    def __post_init__(self) -> None:
        if self.norm not in ("batch", "layer"):
            raise invalid("Head.norm", self.norm, "batch or layer", "choose one; the paper uses batch")
        for name, widths in (("hidden", self.hidden), ("out", (self.out,))):
            if any(width < 1 for width in widths):
                raise invalid(f"Head.{name}", getattr(self, name), "at least 1 wide", "the paper uses 4096 and 256")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimiser and its learning rate.

    Attributes:
        kind: lars, sgd or adamw.
        base_lr: learning rate for a batch of 256; the effective one is base_lr * batch_size / 256.
        bias_lr: the same for parameters with one dimension (biases, norm scales); None takes base_lr.
        constant_predictor_lr: whether the predictors keep the peak learning rate, without warm-up or cosine (SimSiam).
        lr_schedule: whether learning rates and weight decay are set at every step or once an epoch.
        weight_decay: not applied to parameters with one dimension, except by sgd (PAPER.md section 5).
        weight_decay_end: weight decay at the end of the run, reached along a cosine; None keeps it constant.
        momentum: of lars and sgd.
        betas: of adamw.
        eta: trust coefficient of lars.
        clip_grad_norm: largest norm of the whole gradient; None does not clip.
        warmup_epochs: epochs of linear warm-up from 0.
        final_lr_factor: last learning rate as a fraction of the effective one.
    """

    kind: Literal["lars", "sgd", "adamw"] = "lars"
    base_lr: float = 0.4
    bias_lr: float | None = None
    constant_predictor_lr: bool = False
    lr_schedule: Literal["step", "epoch"] = "step"
    weight_decay: float = 1.5e-6
    weight_decay_end: float | None = None
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.98)
    eta: float = 0.001
    clip_grad_norm: float | None = None
    warmup_epochs: float = 10.0
    final_lr_factor: float = 0.001

    def __post_init__(self) -> None:
        if self.kind not in ("lars", "sgd", "adamw"):
            raise invalid("Optimizer.kind", self.kind, "one of lars, sgd, adamw", "choose one of these")
        if self.lr_schedule not in ("step", "epoch"):
            raise invalid("Optimizer.lr_schedule", self.lr_schedule, "step or epoch", "choose one")
        _positive(self, "base_lr", "eta")
        _at_least_zero(self, "weight_decay", "warmup_epochs")
        _fraction(self, "momentum", "final_lr_factor")
        if not (0.0 <= self.betas[0] < 1.0 and 0.0 <= self.betas[1] < 1.0):
            raise invalid("Optimizer.betas", self.betas, "two numbers in [0, 1)", "the paper uses (0.9, 0.98)")
        for name in ("clip_grad_norm", "bias_lr"):
            if getattr(self, name) is not None:
                _positive(self, name)
        if self.weight_decay_end is not None:
            _at_least_zero(self, "weight_decay_end")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The online kNN evaluation and the views it uses.

    Attributes:
        every_epochs: epochs between two evaluations; 0 never evaluates.
        resize: the image's short side is resized to this many pixels,
        crop: then a central square of this side is cut.
        k: numbers of neighbours; the first one is the headline.
        temperature: votes weigh exp(similarity / temperature).
        max_train: largest number of training images used as the neighbour bank (evenly spaced); None takes all.
    """

    every_epochs: int = 10
    resize: int = 256
    crop: int = 224
    k: tuple[int, ...] = (20, 10)
    temperature: float = 0.07
    max_train: int | None = None

    def __post_init__(self) -> None:
        _at_least_zero(self, "every_epochs")
        _positive(self, "resize", "crop", "temperature")
        if self.crop > self.resize:
            raise invalid("Evaluation.crop", self.crop, f"at most Evaluation.resize ({self.resize})", "lower it")
        if not self.k or min(self.k) < 1:
            raise invalid("Evaluation.k", self.k, "one or more numbers of at least 1", "the paper uses 10 and 20")
        if self.max_train is not None:
            _positive(self, "max_train")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the numbers of a run. `dataclasses.replace` makes variants.

    Attributes:
        name: name of the recipe this one is, or was made from.
        method: byol, simsiam or mocov3 (the modules of `mvssl.methods`).
        views: the views of each image, in order.
        task_weights: weight of each task's loss; a task that is not named weighs 1.
        predictors: per-view gives each task its predictor; shared is the paper's control with one for all.
        backbone: the encoder.
        projector: the projection head, shared by all views.
        predictor: the prediction head, one per task.
        optimizer: optimiser and learning rate.
        epochs: passes over the data set.
        batch_size: images per step over all ranks.
        order_chunk: 0 mixes all images of an epoch; a number of neighbouring images to be read in one piece, for data
            that does not fit in memory on a disk that is slow at random places (see `pipelines.order.Order`).
        order_window: images that are mixed at a time where order_chunk is given; memory has to hold two times as many
            encoded images.
        accumulate: parts that each rank's share of the batch goes through one after the other, with one update for all:
            the numbers of as many ranks with a part each (running statistics as rank 0's). BatchNorm takes its
            statistics over a part; without BatchNorm the numbers are those of the whole batch. Stochastic depth draws
            anew for each part.
        target_decay: decay of the target network at step 0, rising to 1 along a cosine; unused by simsiam.
        temperature: of mocov3's InfoNCE, None for the other methods.
        sync_batchnorm: which networks' BatchNorm takes statistics over the images of all ranks instead of each rank's:
            none (the paper's), online, target or both.
        seed: of the order, the draws and the initial weights.
        precision: auto is bf16 on CUDA and fp32 on the CPU.
        channels_last: memory format of convolutional networks.
        step_mode: joint runs all views and one backward; per-view goes view by view with the least memory.
        compile: torch.compile the step; auto compiles on CUDA only.
        evaluation: online kNN.
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
    epochs: int = 200
    batch_size: int = 1024
    order_chunk: int = 0
    order_window: int = 32_768
    accumulate: int = 1
    target_decay: float = 0.996
    temperature: float | None = None
    sync_batchnorm: Literal["none", "online", "target", "both"] = "none"
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool = True
    step_mode: Literal["joint", "per-view"] = "joint"
    compile: Literal["auto", "on", "off"] = "auto"
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        check_views(self.views)
        known = tasks(self.views)
        for task, weight in self.task_weights.items():
            if task not in known:
                raise invalid("Recipe.task_weights", task, f"a task of the views {known}", "correct the name")
            if not (math.isfinite(weight) and weight >= 0):
                raise invalid(f"Recipe.task_weights[{task!r}]", weight, "0 or more", "give a weight")
        for name, allowed in (
            ("predictors", ("per-view", "shared")),
            ("sync_batchnorm", ("none", "online", "target", "both")),
            ("precision", ("auto", "fp32", "bf16", "fp16")),
            ("step_mode", ("joint", "per-view")),
            ("compile", ("auto", "on", "off")),
        ):
            if getattr(self, name) not in allowed:
                raise invalid(f"Recipe.{name}", getattr(self, name), f"one of {', '.join(allowed)}", "choose one")
        _fraction(self, "target_decay")
        _at_least_zero(self, "order_chunk")
        if self.order_window < max(1, self.order_chunk):
            raise invalid(
                "Recipe.order_window",
                self.order_window,
                f"at least order_chunk ({self.order_chunk}) and 1",
                "mix more images, or read shorter pieces",
            )
        if self.batch_size < 2:
            raise invalid("Recipe.batch_size", self.batch_size, "at least 2", "BatchNorm needs two images or more")
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise invalid(
                "Recipe.accumulate",
                self.accumulate,
                f"a divisor of batch_size ({self.batch_size})",
                "give 1 or another one",
            )
        if self.temperature is not None:
            _positive(self, "temperature")
        if self.epochs < 1:
            raise invalid("Recipe.epochs", self.epochs, "at least 1", "give the number of passes over the data")
        if not 0 <= self.seed < 2**63:
            raise invalid("Recipe.seed", self.seed, "between 0 and 2**63 - 1", "give another seed")
        if self.optimizer.warmup_epochs > self.epochs:
            raise InputError(
                f"Optimizer.warmup_epochs is {self.optimizer.warmup_epochs:g} but must be at most the {self.epochs} "
                "epochs of the run: lower it or train longer."
            )
        if self.predictor.out != self.projector.out:
            raise InputError(
                f"Head.out is {self.projector.out} for the projector and {self.predictor.out} for the predictor but "
                "must be the same, since predictions are compared with projections: set both alike."
            )

    @property
    def learning_rate(self) -> float:
        """Effective peak learning rate: base_lr * batch_size / 256 (PAPER.md section 5)."""
        return self.optimizer.base_lr * self.batch_size / 256
