"""A tiny data set and a tiny recipe for whole runs in a second or two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from pipelines.views.presets import paper_views
from tests.samples.data_faults import write_forms
from tests.samples.tiny_runs import train, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled data set with train/ (3 classes, 36 images) and val/ (12 images)."""
    root = tmp_path_factory.mktemp("data")
    write_images(root / "train", classes=3, per_class=12, seed=1)
    write_images(root / "val", classes=3, per_class=4, seed=2)
    return root


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """Multi-task BYOL with a small convolutional network: 4 steps an epoch on `images`, 3 epochs."""
    return Recipe(
        name="demo",
        views=paper_views(num_local=1, num_cutout=1, size=32, local_size=16, blur_kernel=5),
        backbone=Backbone(name="test_resnet"),
        projector=Head(hidden=(32,), out=16),
        predictor=Head(hidden=(32,), out=16),
        optimizer=Optimizer(kind="lars", base_lr=3.0, warmup_epochs=1),
        epochs=3,
        batch_size=8,
        evaluation=Evaluation(every_epochs=1, resize=32, crop=32, k=(5, 1)),
    )


@pytest.fixture(scope="session")
def finished(images: Path, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run of the tiny recipe."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_recipe, images, out)
    return out


@pytest.fixture(scope="session")
def forms(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`images` as a folder, as shards and as .beton; tests copy them before damaging them."""
    return write_forms(images, tmp_path_factory.mktemp("forms"))


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """No TF32 and no atomic sums in cuDNN's convolutions: two runs on a GPU then differ by rounding alone."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
