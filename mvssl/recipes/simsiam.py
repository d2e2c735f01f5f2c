"""The paper's SimSiam runs on ImageNet-1k (arXiv 2602.05845)."""

from __future__ import annotations

import dataclasses

from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.recipes import published
from pipelines.views.presets import paper_views, simsiam_views


@published(74.7)
def simsiam_resnet50_200ep() -> Recipe:
    """Multi-task SimSiam, ResNet-50, ImageNet-1k, 200 epochs.

    Source: arXiv 2602.05845 and its release (PAPER.md sections 2 to 5).
    Cost: 200 epochs of 1.28 M images with 5 views each; the published run used batch 512.
    Command: mvssl-train simsiam_resnet50_200ep --data IMAGENET --out RUN
    """
    return Recipe(
        name="simsiam_resnet50_200ep",
        method="simsiam",
        views=paper_views(num_local=2, num_cutout=1),
        task_weights={"global": 1 / 3, "local": 1 / 3, "cutout": 1 / 3},
        backbone=Backbone(name="resnet50", init="release"),
        projector=Head(hidden=(2048, 2048), out=2048, output_norm=True),
        predictor=Head(hidden=(512,), out=2048),
        optimizer=Optimizer(
            kind="sgd",
            base_lr=0.05,
            weight_decay=1e-4,
            warmup_epochs=0,
            constant_predictor_lr=True,
            lr_schedule="epoch",
        ),
        epochs=200,
        batch_size=512,
        evaluation=Evaluation(max_train=128_000),  # about 100 images a class: enough to follow a run
    )


def simsiam_resnet50_200ep_shared() -> Recipe:
    """Multi-crop SimSiam with one predictor for all views: the paper's control.

    Source: arXiv 2602.05845 and its release (PAPER.md section 1).
    Cost: as simsiam_resnet50_200ep.
    Command: mvssl-train simsiam_resnet50_200ep_shared --data IMAGENET --out RUN
    """
    return dataclasses.replace(simsiam_resnet50_200ep(), name="simsiam_resnet50_200ep_shared", predictors="shared")


def simsiam_resnet50_200ep_two_view() -> Recipe:
    """SimSiam with two views: the baseline that the multi-task form is compared with.

    Source: arXiv 2602.05845 and its release (PAPER.md sections 2 and 4). SimSiam takes half of each of its two terms,
    which is their mean: weight 1.
    Cost: 200 epochs of 1.28 M images with 2 views each.
    Command: mvssl-train simsiam_resnet50_200ep_two_view --data IMAGENET --out RUN
    """
    return dataclasses.replace(
        simsiam_resnet50_200ep(),
        name="simsiam_resnet50_200ep_two_view",
        views=simsiam_views(),
        task_weights={"global": 1.0},
    )
