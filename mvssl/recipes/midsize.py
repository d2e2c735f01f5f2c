"""Runs of hours to a day on one GPU, on public data sets of moderate size. Not from the paper."""

from __future__ import annotations

import dataclasses

from mvssl.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from pipelines.views.presets import paper_views


def byol_resnet18_imagenet100() -> Recipe:
    """Multi-task BYOL, ResNet-18, the paper's views, for 100 classes of ImageNet.

    Source: ours, the paper's ImageNet-1k settings with a smaller batch and a quicker target network, since an epoch has
    a tenth of the images; no published accuracy; not run at this size.
    Cost: 200 epochs of 127,000 images with 5 views each, for one GPU; not measured.
    Command: mvssl-train byol_resnet18_imagenet100 --data IMAGENET100 --out RUN
    """
    return Recipe(
        name="byol_resnet18_imagenet100",
        method="byol",
        views=paper_views(num_local=2, num_cutout=1),
        backbone=Backbone(name="resnet18"),
        projector=Head(hidden=(4096,), out=256),
        predictor=Head(hidden=(4096,), out=256),
        optimizer=Optimizer(kind="lars", base_lr=0.4, weight_decay=1.5e-6, warmup_epochs=10),
        epochs=200,
        batch_size=256,
        target_decay=0.99,
        evaluation=Evaluation(max_train=32_000),
    )


def byol_resnet18_cifar() -> Recipe:
    """Multi-task BYOL, ResNet-18, for 32-pixel images such as CIFAR-10 and CIFAR-100.

    Views are 64 and 32 pixels: the images are enlarged so that the standard stem, which quarters them, sees enough and
    timm loads the backbone as its own resnet18.

    Source: ours, as byol_resnet18_imagenet100; no published accuracy; not run at this size.
    Cost: 200 epochs of 50,000 images with 5 small views each, for one GPU; not measured.
    Command: mvssl-train byol_resnet18_cifar --data CIFAR --out RUN
    """
    return dataclasses.replace(
        byol_resnet18_imagenet100(),
        name="byol_resnet18_cifar",
        views=paper_views(num_local=2, num_cutout=1, size=64, local_size=32, blur_kernel=7),
        evaluation=Evaluation(resize=64, crop=64),
    )
