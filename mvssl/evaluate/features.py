"""Features of a data set: the frozen backbone's output for the centre crop of every image.

Fill a store with the features of a data set: the centre crop of every image, and views that are drawn.

The features that evaluations share: computed once, kept on disk, and taken to where they are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvssl.config.recipe import Evaluation
from mvssl.distributed import World
from mvssl.evaluate.feature_store import BAD, DONE, Dtype, FeatureStore, bytes_needed, not_finite, open_store
from mvssl.evaluate.session import Computing, Session
from mvssl.monitor.console import Progress
from pipelines.decode import DecodeOptions
from pipelines.loading.eval_loader import EvaluationBatch, iterate_augmented, iterate_center
from pipelines.loading.fetch import too_many_bad
from pipelines.loading.pixel_cache import free_memory
from pipelines.runtime import InputError
from pipelines.storage.source import Source
from pipelines.views.spec import ViewSpec


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of N images.

    Attributes:
        values: float32 [N, D] on the device.
        labels: int64 [N] on the device, -1 where there is none.
        index: int64 [N] on the CPU, dataset indices.
    """

    values: Tensor
    labels: Tensor
    index: Tensor


def extract_features(
    backbone: nn.Module,
    source: Source,
    evaluation: Evaluation,
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
    decode: DecodeOptions | None = None,
    batch_size: int = 256,
    max_images: int | None = None,
    progress: Callable[[int], None] | None = None,
    world: World | None = None,
) -> Features:
    """Embed the centre crop of each image (PAPER.md section 6) with the backbone in eval mode.

    The backbone's training mode is put back afterwards. Undecodable images are left out and named in the log, unless
    they are so many that the data is mostly broken. Several ranks embed a share each; all get the features of all
    images, in one order.

    Args:
        backbone: maps [B, 3, S, S] to [B, D].
        source: the images.
        evaluation: resize and crop.
        device: where the backbone is.
        autocast: dtype to compute in; None computes in the weights' own.
        decode: who decodes; None takes `DecodeOptions()`.
        batch_size: images at a time.
        max_images: take at most this many, evenly spaced; None takes all.
        progress: called with the number of images done (by this rank); what it raises ends the extraction.
        world: the ranks that embed together; None is this process alone.

    Raises:
        InputError: too many images cannot be decoded (see `too_many_bad`), the storage is damaged, or features are not
            finite.
        OtherRankFailed: another rank failed.
    """
    world = world or World()
    indices = np.arange(len(source))
    if max_images is not None and max_images < len(source):
        indices = np.linspace(0, len(source) - 1, max_images).round().astype(np.int64)
    share = indices[world.rank :: world.size]
    mine = world.run_on_all(
        lambda: _extract(
            backbone,
            source,
            evaluation,
            device=device,
            autocast=autocast,
            decode=decode,
            batch_size=batch_size,
            indices=share if len(share) else indices[:1],
            progress=progress,
        )
    )
    counts = world.gather_objects((max(1, len(share)), len(mine.index)))  # images of each rank, and those it embedded
    images = sum(count for count, _ in counts)
    bad = images - sum(embedded for _, embedded in counts)
    world.run_on_all(lambda: check_enough(images, bad=bad, source=source))
    if world.size == 1:
        return mine
    index = world.gather_rows(mine.index.to(device))  # the order of the ranks, an image of a tiny set perhaps twice
    _, first = np.unique(index.cpu().numpy(), return_index=True)
    order = torch.from_numpy(first).to(device)
    return Features(
        values=world.gather_rows(mine.values)[order],
        labels=world.gather_rows(mine.labels)[order],
        index=index[order].cpu(),
    )


def check_enough(images: int, *, bad: int, source: Source) -> None:
    """Check that no disk failed meanwhile: the accuracy of the few images left would be told as if it were of all.

    Raises:
        InputError: too many images are bad, of those of all ranks.
    """
    if too_many_bad(bad, images):
        raise InputError(
            f"{bad} of the {images} images of {source.location} cannot be decoded, too many to evaluate the others: "
            "check the data (the log names them), or run mvssl-convert on it, which puts bad images into quarantine."
        )


def embed(
    backbone: nn.Module,
    batches: Generator[EvaluationBatch, None, None],
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """Features of batches of views, by the backbone in eval mode.

    At the end, also an early one, the batches are closed and the backbone's training mode is put back.

    Yields:
        Features float32 [B, D] on the device; index and labels int64 [B] on the CPU.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        for view, index, labels in batches:
            with torch.no_grad(), torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                feature = backbone(view)  # [B, D]
            yield feature.float(), index, labels
    finally:
        batches.close()
        backbone.train(was_training)


def _extract(
    backbone: nn.Module,
    source: Source,
    evaluation: Evaluation,
    *,
    device: torch.device,
    autocast: torch.dtype | None,
    decode: DecodeOptions | None,
    batch_size: int,
    indices: NDArray[np.int64],
    progress: Callable[[int], None] | None,
) -> Features:
    """The features of some images, in the order of `indices`."""
    values: list[Tensor] = []
    labels: list[Tensor] = []
    index: list[Tensor] = []
    done = 0
    batches = iterate_center(
        source,
        resize=evaluation.resize,
        crop=evaluation.crop,
        batch_size=batch_size,
        device=device,
        decode=decode,
        indices=indices,
    )
    with closing(embed(backbone, batches, device=device, autocast=autocast)) as embedded:
        for feature, batch_index, batch_labels in embedded:
            values.append(feature)
            labels.append(batch_labels)
            index.append(batch_index)
            done += len(batch_index)
            if progress is not None:
                progress(done)
    together = torch.cat(values)
    if not bool(torch.isfinite(together).all()):
        row = int((~torch.isfinite(together)).any(dim=1).nonzero()[0])
        raise not_finite(source.key(int(torch.cat(index)[row])))
    return Features(values=together, labels=torch.cat(labels).to(device), index=torch.cat(index))


TRAIN_AREA = (0.08, 1.0)  # torchvision's RandomResizedCrop, which the linear protocols use


def train_view(size: int) -> ViewSpec:
    """The view that evaluations train on: random resized crop and flip (PAPER.md section 6)."""
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
        OtherRankFailed: another rank failed.
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
                partial(iterate_augmented, source, spec, seed=seed, epoch=view - 1)
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

    world.run_on_all(work)
    world.run_on_all(lambda: check_enough(len(images), bad=_bad(store, len(images)), source=source))


def _bad(store: FeatureStore, images: int) -> int:
    return int((store.state[:images] == BAD).sum())


EXACT = 2**30
"""Bytes up to which features are kept in float32; more are kept in float16."""

_SHARE = 0.5  # of free memory that features may take


def stored(session: Session, source: Source, what: str, *, drawn: int = 0, seed: int = 0) -> FeatureStore:
    """The features of a source on disk, in a folder named by what they are of; computed where they are not there.

    Raises:
        InputError: images cannot be decoded, or features are not finite.
        OSError: there is no room for them.
    """
    evaluation = session.measured.evaluation
    identity = {
        "weights": session.measured.digest,
        "data": source.fingerprint,
        "resize": evaluation.resize,
        "crop": evaluation.crop,
        "drawn": drawn,
        "seed": seed if drawn else 0,
        "precision": str(session.autocast),
    }
    folder = session.out / "features" / f"{what}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"
    rows = len(source) * (1 + drawn)
    dtype: Dtype = "float32" if bytes_needed(rows, session.width, "float32") <= EXACT else "float16"
    store = open_store(folder, rows=rows, width=session.width, dtype=dtype, identity=identity, world=session.world)
    missing = len(store.to_do(range(rows)))
    if missing:
        size = bytes_needed(rows, session.width, dtype) / 2**20
        session.say(
            f"{missing:,} of {rows:,} features of {source.location} are computed and kept in {folder}: {size:,.0f} MiB"
        )
    fill_store(
        store,
        session.measured.backbone,
        source,
        evaluation,
        drawn=drawn,
        seed=seed,
        device=session.device,
        autocast=session.autocast,
        computing=session.computing,
        world=session.world,
        progress=Progress(
            session.console, f"features of {source.location}", total=-(-missing // session.world.size)
        ).add,
    )
    return store


def loaded(session: Session, store: FeatureStore, labels: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Features [R, D], labels [R] and image numbers [R] of the rows that are there.

    They lie on the device if there is room, else in the machine's memory, else they stay on the disk.
    """
    rows = np.flatnonzero(store.state == DONE)
    device = session.device
    memory = free_memory(device, processes=session.world.local_size)
    whole = len(rows) == len(store.state)
    values = torch.from_numpy(store.values)  # mapped: read when it is used
    if not whole:
        values = torch.from_numpy(store.values[rows])
    if device.type == "cuda" and values.nbytes < _SHARE * memory.device:
        values = values.to(device)
    elif values.nbytes < _SHARE * memory.host:
        values = values.clone()
    image = torch.from_numpy(rows % len(labels))
    truth = torch.from_numpy(labels)[image]
    return values, truth.to(device), image.to(device)
