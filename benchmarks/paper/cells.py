"""The cells of the paper's comparison at a small scale: methods, variants, sizes, and the recipe of each.

A cell is one run. Each arm (two-view, shared, per-view) of each method is tuned alike: one run for each point of a
small grid of learning rate, weight decay and EMA momentum, with a seed of its own and fewer epochs, judged by kNN on
images that are neither trained on nor tested on. The best point is then run with other seeds. The GPU setting takes the
points that the CPU setting chose, so its first runs are those of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from pipelines.views.presets import byol_views, mocov3_views, paper_views, simsiam_views
from pipelines.views.spec import ViewSpec, tasks

METHODS = ("byol", "simsiam", "mocov3")
TITLES = {"byol": "BYOL", "simsiam": "SimSiam", "mocov3": "MoCo v3"}
VARIANTS = ("two-view", "shared", "per-view", "shared + cutout", "per-view + cutout")
ARMS = ("shared", "per-view", "two-view")
"""The variants that are tuned; those with a cutout view take the point of the arm without."""
OPTIMIZERS = {"paper": "the paper's optimiser (LARS; SGD for SimSiam)", "adamw": "AdamW"}
KIND_TITLES = {"lars": "LARS", "sgd": "SGD", "adamw": "AdamW"}
TUNING_SEED = 0
TWO_VIEWS: dict[str, Callable[..., tuple[ViewSpec, ...]]] = {
    "byol": byol_views,
    "simsiam": simsiam_views,
    "mocov3": mocov3_views,
}
_OPTIMIZER = {  # learning rate for a batch of 256, weight decay and another one to try
    "lars": (2.0, 1.5e-6, 1e-4),
    "sgd": (0.05, 1e-4, 5e-4),
    "adamw": (4e-3, 0.05, 0.01),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The size of every run.

    Attributes:
        classes: number of classes, the first in alphabetical order.
        train_images: training images of each class, the first in alphabetical order.
        tuning_images: images of each class that judge tuning, the next ones.
        backbone: the encoder.
        init: its initial weights, as in `mvssl.config.recipe.Backbone`.
        size, local_size: pixels of the global and local views.
        evaluation_size: pixels of an image in evaluations.
        epochs, tuning_epochs: of a run, and of a tuning run.
        batch_size: images a step.
        target_decay: EMA momentum in the middle of the grid.
        precision: of training.
        marks: times during a run at which gradients are compared.
    """

    classes: int
    train_images: int
    tuning_images: int
    backbone: str
    init: Literal["timm", "release"]
    size: int
    local_size: int
    evaluation_size: int
    epochs: int
    tuning_epochs: int
    batch_size: int
    target_decay: float
    precision: Literal["auto", "fp32", "bf16"]
    marks: int


SECONDS = {"cpu": 400.0, "cpu_release": 400.0, "gpu": 120.0, "rehearsal": 10.0}
"""Estimate for a run of all epochs, before one is known: two at a time, on two cores or on an H100."""
TUNED_BY: dict[str, Literal["cpu"]] = {"gpu": "cpu", "rehearsal": "cpu"}
"""Settings that take the points of another one's tuning, by name: EMA momenta are those of a setting's own grid."""
_CPU = Setting(
    classes=20,
    train_images=200,
    tuning_images=100,
    backbone="resnet10_tiny",
    init="timm",
    size=24,
    local_size=16,
    evaluation_size=32,
    epochs=40,
    tuning_epochs=10,
    batch_size=64,
    target_decay=0.98,
    precision="bf16",
    marks=8,
)
SETTINGS = {
    "cpu": _CPU,
    "cpu_release": replace(_CPU, init="release"),
    "gpu": Setting(
        classes=50,
        train_images=450,
        tuning_images=50,
        backbone="resnet18_small",
        init="release",
        size=32,
        local_size=16,
        evaluation_size=40,
        epochs=40,  # six runs in nine minutes, two at a time
        tuning_epochs=10,
        batch_size=256,
        target_decay=0.99,
        precision="auto",
        marks=10,
    ),
    "rehearsal": replace(
        _CPU,
        classes=2,
        train_images=16,
        tuning_images=3,
        init="release",
        epochs=2,
        tuning_epochs=1,
        batch_size=8,
        precision="fp32",
        marks=2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of the grid.

    Attributes:
        name: the change from the middle of the grid.
        base_lr: learning rate for a batch of 256.
        weight_decay: of the optimiser.
        target_decay: EMA momentum of the target network at the first step; unused by SimSiam.
    """

    name: str
    base_lr: float
    weight_decay: float
    target_decay: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the comparison.

    Attributes:
        method, variant: of METHODS and VARIANTS.
        optimizer: of OPTIMIZERS.
        seed: of order, augmentation parameters and initial weights.
        point: name of the grid's point in a tuning run; None takes the point that tuning chose.
    """

    method: str
    variant: str
    optimizer: str = "paper"
    seed: int
    point: str | None = None

    @property
    def arm(self) -> str:
        """The variant whose tuning chooses the point."""
        return self.variant.removesuffix(" + cutout")

    @property
    def name(self) -> str:
        """Name of its run folder."""
        end = f"seed{self.seed}" if self.point is None else f"tuning-{self.point.replace(' ', '')}"
        return f"{self.method}-{self.optimizer}-{self.variant.replace(' + ', '-')}-{end}"


def kind_of(method: str, optimizer: str) -> Literal["lars", "sgd", "adamw"]:
    """The optimiser's name in a recipe (PAPER.md section 5)."""
    if optimizer == "adamw":
        return "adamw"
    return "sgd" if method == "simsiam" else "lars"


def grid(method: str, optimizer: str, setting: Setting) -> tuple[Point, ...]:
    """The points of tuning, the same for every arm: a middle, and one number changed at a time."""
    lr, decay, other_decay = _OPTIMIZER[kind_of(method, optimizer)]
    middle = Point(name="middle", base_lr=lr, weight_decay=decay, target_decay=setting.target_decay)
    points = [
        middle,
        replace(middle, name="lr x 10", base_lr=10 * lr),
        replace(middle, name="lr x 3", base_lr=3 * lr),
        replace(middle, name="lr div 3", base_lr=lr / 3),
        replace(middle, name="decay", weight_decay=other_decay),
    ]
    if method != "simsiam":
        gap = 1 - setting.target_decay
        points += [
            replace(middle, name="slow target", target_decay=round(1 - gap / 3, 5)),
            replace(middle, name="quick target", target_decay=round(1 - gap * 3, 5)),
        ]
    # Last, as it was added later, when the largest learning rate was the best of some arms: of equals the first wins.
    return (*points, replace(middle, name="lr x 30", base_lr=30 * lr))


def plan(
    setting: Setting,
    seeds: Sequence[int],
    optimizers: Sequence[str] = tuple(OPTIMIZERS),
    methods: Sequence[str] = METHODS,
    *,
    tune: bool = True,
) -> list[Cell]:
    """All cells, the most informative first: shared against per-view of BYOL, its baseline, the other methods.

    Without `tune` there are no tuning runs, as the points are known already.
    """
    cells: list[Cell] = []
    for optimizer, method in product(optimizers, methods):
        points = grid(method, optimizer, setting) if tune else ()
        for arms in (("shared", "per-view"), ("two-view",)):
            cells += [
                Cell(method=method, variant=arm, optimizer=optimizer, seed=TUNING_SEED, point=point.name)
                for point, arm in product(points, arms)
            ]
            cells += [
                Cell(method=method, variant=arm, optimizer=optimizer, seed=seed) for seed, arm in product(seeds, arms)
            ]
        for variant in ("per-view + cutout", "shared + cutout"):
            cells += [Cell(method=method, variant=variant, optimizer=optimizer, seed=seed) for seed in seeds]
    return cells


def make_recipe(cell: Cell, point: Point, setting: Setting) -> Recipe:
    """The recipe of a cell: heads and loss of the method, views and predictors of the variant, the rest in common."""
    sizes = {"size": setting.size, "blur_kernel": max(3, setting.size // 10 * 2 - 1)}
    views = (
        TWO_VIEWS[cell.method](**sizes)
        if cell.variant == "two-view"
        else paper_views(
            num_local=2, num_cutout=1 if cell.variant.endswith("cutout") else 0, local_size=setting.local_size, **sizes
        )
    )
    # PAPER.md section 4: BYOL and MoCo v3 sum the two terms of the baseline and the tasks; SimSiam takes means of both.
    names = tasks(views)
    weight = 1 / len(names) if cell.method == "simsiam" else 2.0 if cell.variant == "two-view" else 1.0
    simsiam = cell.method == "simsiam"
    epochs = setting.epochs if cell.point is None else setting.tuning_epochs
    return Recipe(
        name=cell.name,
        method=cell.method,
        views=views,
        task_weights=dict.fromkeys(names, weight),
        predictors="shared" if cell.arm == "shared" else "per-view",
        backbone=Backbone(name=setting.backbone, init=setting.init),
        projector=Head(
            hidden=(512, 512) if simsiam else (1024,),
            out=512 if simsiam else 256,
            output_norm=cell.method != "byol",
        ),
        predictor=Head(
            hidden=(128,) if simsiam else (1024,),
            out=512 if simsiam else 256,
            output_norm=cell.method == "mocov3",
        ),
        optimizer=Optimizer(
            kind=kind_of(cell.method, cell.optimizer),
            base_lr=point.base_lr,
            weight_decay=point.weight_decay,
            warmup_epochs=0 if simsiam and cell.optimizer == "paper" else epochs / 10,
            constant_predictor_lr=simsiam,
        ),
        temperature=1.0 if cell.method == "mocov3" else None,
        epochs=epochs,
        batch_size=setting.batch_size,
        target_decay=point.target_decay,
        seed=cell.seed,
        precision=setting.precision,
        evaluation=Evaluation(every_epochs=0, resize=setting.evaluation_size, crop=setting.evaluation_size),
    )
