"""Our own recipes for small data, from minutes on a laptop to a day on one GPU; not from the paper."""

from __future__ import annotations

import dataclasses

from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.recipes.byol import byol_resnet50_200ep
from pipelines.views.presets import paper_views


def demo() -> Recipe:
    """Multi-task BYOL, ResNet-10-T, small views, for the synthetic data set of tools/make_demo_dataset.py.

    Source: ours, sized for two CPU cores; no published accuracy. A small batch, a low EMA momentum and AdamW suit its
    few images and steps.
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


def simsiam_resnet18_tiny_imagenet() -> Recipe:
    """Multi-task SimSiam, ResNet-18, small views, for 64-pixel images such as Tiny ImageNet.

    Source: ours, byol_resnet18_tiny_imagenet with the paper's SimSiam settings and narrower heads; no published
    accuracy; not run at this size.
    Cost: less than byol_resnet18_tiny_imagenet, as there is no target network; not measured.
    Command: mvssl-train simsiam_resnet18_tiny_imagenet --data TINY --out RUN
    """
    return dataclasses.replace(
        byol_resnet18_tiny_imagenet(),
        name="simsiam_resnet18_tiny_imagenet",
        method="simsiam",
        task_weights={"global": 1 / 3, "local": 1 / 3, "cutout": 1 / 3},
        projector=Head(hidden=(1024, 1024), out=1024, output_norm=True),
        predictor=Head(hidden=(256,), out=1024),
        optimizer=Optimizer(kind="sgd", base_lr=0.05, weight_decay=1e-4, warmup_epochs=0, constant_predictor_lr=True),
    )


def mocov3_resnet18_tiny_imagenet() -> Recipe:
    """Multi-task MoCo v3, ResNet-18, small views, for 64-pixel images such as Tiny ImageNet.

    Source: ours, byol_resnet18_tiny_imagenet with the paper's MoCo v3 heads and loss; no published accuracy; not run
    at this size.
    Cost: about that of byol_resnet18_tiny_imagenet; not measured.
    Command: mvssl-train mocov3_resnet18_tiny_imagenet --data TINY --out RUN
    """
    return dataclasses.replace(
        byol_resnet18_tiny_imagenet(),
        name="mocov3_resnet18_tiny_imagenet",
        method="mocov3",
        projector=Head(hidden=(1024,), out=256, output_norm=True),
        predictor=Head(hidden=(1024,), out=256, output_norm=True),
        temperature=1.0,
    )


def laptop() -> Recipe:
    """Multi-task BYOL, ResNet-18, views of 64 and 32 pixels, for a folder of a few thousand photographs and no GPU.

    Source: ours, byol_resnet18_tiny_imagenet with larger views and more epochs; no published accuracy; not run at this
    size. With fewer than 2,000 photographs, train for more epochs.
    Cost: about an hour on two cores for 5,000 photographs, estimated from a dry run at 31 images/s.
    Command: mvssl-train laptop --data PHOTOS --out RUN
    """
    return dataclasses.replace(
        byol_resnet18_tiny_imagenet(),
        name="laptop",
        views=paper_views(num_local=2, num_cutout=1, size=64, local_size=32, blur_kernel=7),
        optimizer=Optimizer(kind="adamw", base_lr=2e-3, weight_decay=0.05, warmup_epochs=2),
        epochs=20,
        batch_size=64,
        evaluation=Evaluation(every_epochs=5, resize=72, crop=64),
    )


def byol_resnet18_imagenet100() -> Recipe:
    """Multi-task BYOL, ResNet-18, the paper's views, for 100 classes of ImageNet.

    Source: ours, the paper's ImageNet-1k settings with a smaller batch and a lower EMA momentum, since an epoch has a
    tenth of the images; no published accuracy; not run at this size.
    Cost: 200 epochs of 127,000 images with 5 views each, for one GPU; not measured.
    Command: mvssl-train byol_resnet18_imagenet100 --data IMAGENET100 --out RUN
    """
    return dataclasses.replace(
        byol_resnet50_200ep(),
        name="byol_resnet18_imagenet100",
        backbone=Backbone(name="resnet18"),
        batch_size=256,
        target_decay=0.99,
        evaluation=Evaluation(max_train=32_000),
    )


def byol_resnet18_cifar() -> Recipe:
    """Multi-task BYOL, ResNet-18 for small images, views of 32 and 16 pixels, for CIFAR-10 and CIFAR-100.

    Source: ours, after the paper's settings, with the usual 3x3 stem for small images, narrower heads and a lower EMA
    momentum, since an epoch has few steps; no published accuracy; not run on CIFAR.
    Cost: 200 epochs of 50,000 images with 5 small views each, for one GPU; not measured.
    Command: mvssl-train byol_resnet18_cifar --data CIFAR --out RUN --cache auto
    """
    return Recipe(
        name="byol_resnet18_cifar",
        views=paper_views(num_local=2, num_cutout=1, size=32, local_size=16, blur_kernel=5),
        backbone=Backbone(name="resnet18_small"),
        projector=Head(hidden=(1024,), out=256),
        predictor=Head(hidden=(1024,), out=256),
        optimizer=Optimizer(kind="lars", base_lr=2.0, weight_decay=1.5e-6, warmup_epochs=10),
        epochs=200,
        batch_size=256,
        target_decay=0.99,
        evaluation=Evaluation(resize=32, crop=32),
    )


def simsiam_resnet18_cifar() -> Recipe:
    """Multi-task SimSiam, ResNet-18 for small images, for CIFAR-10 and CIFAR-100.

    Source: ours, byol_resnet18_cifar with the paper's SimSiam settings and narrower heads; no published accuracy; not
    run on CIFAR.
    Cost: less than byol_resnet18_cifar, as there is no target network; not measured.
    Command: mvssl-train simsiam_resnet18_cifar --data CIFAR --out RUN --cache auto
    """
    return dataclasses.replace(
        byol_resnet18_cifar(),
        name="simsiam_resnet18_cifar",
        method="simsiam",
        task_weights={"global": 1 / 3, "local": 1 / 3, "cutout": 1 / 3},
        projector=Head(hidden=(1024, 1024), out=1024, output_norm=True),
        predictor=Head(hidden=(256,), out=1024),
        optimizer=Optimizer(kind="sgd", base_lr=0.05, weight_decay=1e-4, warmup_epochs=0, constant_predictor_lr=True),
    )


def mocov3_resnet18_cifar() -> Recipe:
    """Multi-task MoCo v3, ResNet-18 for small images, for CIFAR-10 and CIFAR-100.

    Source: ours, byol_resnet18_cifar with the paper's MoCo v3 heads and loss; no published accuracy; not run on CIFAR.
    Cost: about that of byol_resnet18_cifar; not measured.
    Command: mvssl-train mocov3_resnet18_cifar --data CIFAR --out RUN --cache auto
    """
    return dataclasses.replace(
        byol_resnet18_cifar(),
        name="mocov3_resnet18_cifar",
        method="mocov3",
        projector=Head(hidden=(1024,), out=256, output_norm=True),
        predictor=Head(hidden=(1024,), out=256, output_norm=True),
        temperature=1.0,
    )
