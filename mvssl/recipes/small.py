"""Small runs: for a laptop, a demonstration, a first look. Not from the paper."""

from __future__ import annotations

from mvssl.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from pipelines.views.presets import paper_views


def demo() -> Recipe:
    """Multi-task BYOL, ResNet-10-T, small views, for the drawn data set of tools/make_demo_dataset.py.

    Source: ours, sized for two CPU cores; no published accuracy. Few images and few steps: hence the small batch, the
    quick target network and AdamW.
    Cost: 3 to 4 minutes on two cores.
    Command: tools/demo.sh
    """
    return Recipe(
        name="demo",
        views=paper_views(num_local=2, num_cutout=1, size=32, local_size=16, blur_kernel=5),
        backbone=Backbone(name="resnet10t"),
        projector=Head(hidden=(512,), out=128),
        predictor=Head(hidden=(512,), out=128),
        optimizer=Optimizer(kind="adamw", base_lr=8e-3, weight_decay=0.01, warmup_epochs=1),
        epochs=10,
        batch_size=64,
        target_decay=0.97,
        evaluation=Evaluation(every_epochs=5, resize=64, crop=64),
    )


def byol_resnet18_tiny_imagenet() -> Recipe:
    """Multi-task BYOL, ResNet-18, small views, for 64-pixel images such as Tiny ImageNet.

    Source: ours, sized for 30 minutes on two CPU cores and 25,000 images; no published accuracy.
    Cost: about 30 minutes on two cores for 25,000 images.
    Command: mvssl-train byol_resnet18_tiny_imagenet --data TINY --out RUN
    """
    return Recipe(
        name="byol_resnet18_tiny_imagenet",
        views=paper_views(num_local=2, num_cutout=1, size=32, local_size=16, blur_kernel=5),
        backbone=Backbone(name="resnet18"),
        projector=Head(hidden=(1024,), out=256),
        predictor=Head(hidden=(1024,), out=256),
        optimizer=Optimizer(kind="adamw", base_lr=2e-3, weight_decay=0.05, warmup_epochs=0.5),
        epochs=7,
        batch_size=128,
        target_decay=0.99,
        evaluation=Evaluation(every_epochs=7, resize=64, crop=64),
    )
