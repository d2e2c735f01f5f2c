"""Small steps of every kind, and batches for them, for the tests of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.training.step import TrainStep
from pipelines.views.presets import paper_views

VIT: dict[str, Any] = {"backbone": Backbone(name="test_vit", drop_path=0.3)}
ADAMW: dict[str, Any] = {
    "optimizer": Optimizer(kind="adamw", base_lr=0.1, weight_decay=0.04, weight_decay_end=0.4, warmup_epochs=3)
}
SIMSIAM: dict[str, Any] = {"method": "simsiam", "projector": Head(hidden=(20,), out=12, output_norm=True)}
MOCO: dict[str, Any] = {"method": "mocov3", "temperature": 1.0}
RECIPE = Recipe(
    name="ready",
    views=paper_views(size=32, local_size=16, blur_kernel=5),
    backbone=Backbone(name="test_resnet"),
    projector=Head(hidden=(20,), out=12),
    predictor=Head(hidden=(20,), out=12),
    optimizer=Optimizer(kind="lars", base_lr=3.0, warmup_epochs=3, weight_decay=1e-4),
    epochs=9,
    batch_size=8,
    target_decay=0.9,
    evaluation=Evaluation(resize=32, crop=32),
)


def batches(step: TrainStep) -> Callable[[int], list[Tensor]]:
    def batch(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(step.recipe.batch_size, 3, spec.size, spec.size, generator=generator)
            for spec in step.recipe.views
        ]

    return batch
