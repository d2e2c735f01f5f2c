"""The paper's MoCo v3 runs on ImageNet-1k (arXiv 2602.05845)."""

from __future__ import annotations

import dataclasses

from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.recipes import published
from pipelines.views.presets import mocov3_views, paper_views


@published(75.7)
def mocov3_resnet50_200ep() -> Recipe:
    """Multi-task MoCo v3, ResNet-50, ImageNet-1k, 200 epochs.

    Source: arXiv 2602.05845 and its code (PAPER.md sections 2 to 5).
    Cost: 200 epochs of 1.28 M images with 5 views each; the published run used batch 1024.
    Command: mvssl-train mocov3_resnet50_200ep --data IMAGENET --out RUN
    """
    return Recipe(
        name="mocov3_resnet50_200ep",
        method="mocov3",
        views=paper_views(num_local=2, num_cutout=1),
        backbone=Backbone(name="resnet50", init="release"),
        projector=Head(hidden=(4096,), out=256, output_norm=True),
        predictor=Head(hidden=(4096,), out=256, output_norm=True),
        optimizer=Optimizer(kind="lars", base_lr=0.4, weight_decay=1.5e-6, warmup_epochs=10),
        epochs=200,
        batch_size=1024,
        target_decay=0.996,
        temperature=1.0,
        evaluation=Evaluation(max_train=128_000),  # about 100 images a class: enough to follow a run
    )


def mocov3_resnet50_200ep_shared() -> Recipe:
    """Multi-crop MoCo v3 with one predictor for all views: the paper's control.

    Source: arXiv 2602.05845 and its code (PAPER.md section 1).
    Cost: as mocov3_resnet50_200ep.
    Command: mvssl-train mocov3_resnet50_200ep_shared --data IMAGENET --out RUN
    """
    return dataclasses.replace(mocov3_resnet50_200ep(), name="mocov3_resnet50_200ep_shared", predictors="shared")


def mocov3_resnet50_200ep_two_view() -> Recipe:
    """MoCo v3 with two views: the baseline that the multi-task form is compared with.

    Source: arXiv 2602.05845 and its code (PAPER.md sections 2 and 4). MoCo v3 sums its two terms; a task's loss is
    their mean, hence the weight 2.
    Cost: 200 epochs of 1.28 M images with 2 views each.
    Command: mvssl-train mocov3_resnet50_200ep_two_view --data IMAGENET --out RUN
    """
    return dataclasses.replace(
        mocov3_resnet50_200ep(),
        name="mocov3_resnet50_200ep_two_view",
        views=mocov3_views(),
        task_weights={"global": 2.0},
    )
