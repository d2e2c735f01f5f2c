"""Fill a store with the features of a data set: the centre crop of every image, and views that are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch
from torch import nn

from mvssl.distributed import World
from mvssl.evaluate.computing import Computing
from mvssl.evaluate.features.extract import check_enough, embed
from mvssl.evaluate.features.store import BAD, FeatureStore
from mvssl.recipe import Evaluation
from pipelines.evaluation import iterate_center, iterate_drawn
from pipelines.storage.source import Source
from pipelines.views.spec import ViewSpec

TRAIN_AREA = (0.08, 1.0)  # torchvision's RandomResizedCrop, which the linear protocols use


def train_view(size: int) -> ViewSpec:
    """The view that evaluations train on: random resized crop and flip (SPEC section 6)."""
    return ViewSpec(
        name="train",
        task="classify",
        size=size,
        area=TRAIN_AREA,
        flip=0.5,
        jitter_p=0.0,
        jitter=(0.0, 0.0, 0.0, 0.0),
        grayscale=0.0,
        blur=0.0,
        blur_kernel=1,
    )


def fill_store(
    store: FeatureStore,
    backbone: nn.Module,
    source: Source,
    evaluation: Evaluation,
    *,
    drawn: int = 0,
    seed: int = 0,
    device: torch.device,
    autocast: torch.dtype | None = None,
    computing: Computing,
    world: World | None = None,
    indices: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Compute the rows that are not there yet.

    With N images the rows are: N centre crops in the order of the images, then N for each of the `drawn` views.

    Args:
        store: of N * (1 + drawn) rows.
        backbone: [B, 3, S, S] to [B, D], on the device.
        source: the images.
        evaluation: resize and crop.
        drawn: random views of each image besides the centre crop.
        seed: of what is drawn.
        device: of the backbone.
        autocast: dtype to compute in; None computes in the weights' own.
        computing: who decodes, and how many images the backbone takes at a time.
        world: the ranks, which take every size-th row each.
        indices: the images that the store is of; None for all.
        progress: called with the number of rows that this rank has just added; what it raises stops the work, and the
            rows so far are kept.

    Raises:
        InputError: too many images cannot be decoded, the storage is damaged, or features are not finite.
        FailedElsewhere: another rank failed.
    """
    world = world or World()
    images = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    place = np.full(len(source), -1, dtype=np.int64)
    place[images] = np.arange(len(images))
    spec = train_view(evaluation.crop)
    todo = [store.to_do(range(view * len(images), (view + 1) * len(images))) for view in range(1 + drawn)]

    def work() -> None:
        for view, rows in enumerate(todo):
            mine = rows[world.rank :: world.size]
            if not len(mine):
                continue
            wanted = images[mine - view * len(images)]
            make = (
                partial(iterate_drawn, source, spec, seed=seed, epoch=view - 1)
                if view
                else partial(iterate_center, source, resize=evaluation.resize, crop=evaluation.crop)
            )
            batches = make(batch_size=computing.extract_batch, device=device, decode=computing.decode, indices=wanted)
            try:
                with closing(embed(backbone, batches, device=device, autocast=autocast)) as embedded:
                    seen = []
                    for feature, index, _ in embedded:
                        found = view * len(images) + place[index.numpy()]
                        store.write(found, feature.cpu().numpy(), [source.key(i) for i in index.tolist()])
                        seen.append(found)
                        if progress is not None:
                            progress(len(found))
                store.mark_bad(np.setdiff1d(mine, np.concatenate([*seen, mine[:0]])))
            finally:
                store.save()

    world.together(work)
    world.together(lambda: check_enough(len(images), bad=_bad(store, len(images)), source=source))


def _bad(store: FeatureStore, images: int) -> int:
    return int((store.state[:images] == BAD).sum())
