"""Small runs: for a laptop, a demonstration, a first look. Not from the paper."""

from __future__ import annotations

from mvssl.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from pipelines.views.spec import paper_views


def demo() -> Recipe:
    """Multi-task BYOL, small ResNet-18 views, for the drawn data set of tools/make_demo_dataset.py.

    Source: ours, sized for two CPU cores; no published accuracy.
    Cost: about 3 minutes on two cores.
    Command: tools/demo.sh
    """
    return Recipe(
        name="demo",
        views=paper_views(num_local=2, num_cutout=1, size=32, local_size=16, blur_kernel=5),
        backbone=Backbone(name="resnet18"),
        projector=Head(hidden=(512,), out=128),
        predictor=Head(hidden=(512,), out=128),
        optimizer=Optimizer(kind="adamw", base_lr=2e-3, weight_decay=0.01, warmup_epochs=1),
        epochs=10,
        batch_size=128,
        target_decay=0.99,
        evaluation=Evaluation(every_epochs=5, resize=64, crop=64),
    )


def byol_resnet18_tiny_imagenet() -> Recipe:
    """Multi-task BYOL, ResNet-18, small views, for 64-pixel images such as Tiny ImageNet.

    Source: ours, sized for two CPU cores; no published accuracy.
    Command: mvssl-train byol_resnet18_tiny_imagenet --data TINY --out RUN
    """
    return Recipe(
        name="byol_resnet18_tiny_imagenet",
        views=paper_views(num_local=2, num_cutout=1, size=32, local_size=16, blur_kernel=5),
        backbone=Backbone(name="resnet18"),
        projector=Head(hidden=(2048,), out=256),
        predictor=Head(hidden=(2048,), out=256),
        optimizer=Optimizer(kind="adamw", base_lr=1e-3, weight_decay=0.01, warmup_epochs=1),
        epochs=12,
        batch_size=256,
        target_decay=0.99,
        evaluation=Evaluation(every_epochs=4, resize=64, crop=64),
    )
