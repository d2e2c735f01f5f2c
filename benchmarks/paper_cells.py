"""What the paper's comparison at a small scale compares: methods, variants, sizes, and the recipe of each cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mvssl.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from pipelines.views.presets import byol_views, mocov3_views, paper_views, simsiam_views
from pipelines.views.spec import ViewSpec, tasks

METHODS = ("byol", "simsiam", "mocov3")
TITLES = {"byol": "BYOL", "simsiam": "SimSiam", "mocov3": "MoCo v3"}
VARIANTS = ("two-view", "shared", "per-view", "per-view + cutout")
TWO_VIEWS: dict[str, Callable[..., tuple[ViewSpec, ...]]] = {
    "byol": byol_views,
    "simsiam": simsiam_views,
    "mocov3": mocov3_views,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The size of every run.

    Attributes:
        classes, per_class: classes and training images of each that are used, the first in alphabetical order.
        size, local_size: pixels of the global and local views.
        epochs, batch_size: the budget.
        base_lr, target_decay: of all methods (AdamW; SimSiam has no moving average).
    """

    classes: int
    per_class: int
    size: int
    local_size: int
    epochs: int
    batch_size: int
    base_lr: float
    target_decay: float


SETTINGS = {
    "cpu": Setting(
        classes=20, per_class=100, size=32, local_size=16, epochs=8, batch_size=32, base_lr=4e-3, target_decay=0.99
    ),
    "gpu": Setting(
        classes=50, per_class=500, size=64, local_size=32, epochs=100, batch_size=256, base_lr=2e-3, target_decay=0.99
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the comparison."""

    method: str
    variant: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{self.method}-{self.variant.replace(' + ', '-')}-seed{self.seed}"


def make_recipe(cell: Cell, setting: Setting) -> Recipe:
    """The recipe of a cell: the method's heads and loss, the variant's views and predictors, the common rest."""
    sizes = {"size": setting.size, "blur_kernel": max(3, setting.size // 10 * 2 - 1)}
    views = (
        TWO_VIEWS[cell.method](**sizes)
        if cell.variant == "two-view"
        else paper_views(
            num_local=2, num_cutout=1 if cell.variant.endswith("cutout") else 0, local_size=setting.local_size, **sizes
        )
    )
    # SPEC section 4: BYOL and MoCo v3 sum the two terms of the baseline and the tasks; SimSiam takes means of both.
    names = tasks(views)
    weight = 1 / len(names) if cell.method == "simsiam" else 2.0 if cell.variant == "two-view" else 1.0
    simsiam = cell.method == "simsiam"
    return Recipe(
        name=cell.folder,
        method=cell.method,
        views=views,
        task_weights=dict.fromkeys(names, weight),
        predictors="shared" if cell.variant == "shared" else "per-view",
        backbone=Backbone(name="resnet18"),
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
            kind="adamw",
            base_lr=setting.base_lr,
            weight_decay=0.05,
            warmup_epochs=min(10, setting.epochs / 10),
            constant_predictor_lr=simsiam,
        ),
        temperature=1.0 if cell.method == "mocov3" else None,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        target_decay=setting.target_decay,
        seed=cell.seed,
        channels_last=torch.cuda.is_available(),  # on the CPU maps this small are faster channel by channel
        evaluation=Evaluation(every_epochs=setting.epochs, resize=64, crop=64),
    )
