"""Features of a data set: extracted in memory, or cached on disk for all evaluations of a backbone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvssl.config.recipe import Evaluation
from mvssl.evaluate.feature_store import BAD, DONE, MISSING, Dtype, FeatureStore, bytes_needed, not_finite, open_store
from mvssl.evaluate.session import BackboneSession, EvalSession, Session, interpolated
from pipelines.loading.deep_images import pixels_of
from pipelines.loading.eval_loader import EvaluationBatch, iterate_augmented, iterate_center
from pipelines.loading.fetch import too_many_bad
from pipelines.loading.pixel_cache import free_memory
from pipelines.progress import Progress
from pipelines.runtime import InputError
from pipelines.storage.source import Source
from pipelines.views.spec import Interpolation, ViewSpec

FLOAT32_BYTES = 2**30
"""Size up to which features are cached in float32; larger ones are cached in float16."""
_MEMORY_FRACTION = 0.5  # of free memory that features may take


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of N images.

    Attributes:
        values: float32 [N, D] on the device.
        labels: int64 [N] on the device, -1 for none.
        index: int64 [N] on the CPU, dataset indices.
    """

    values: Tensor
    labels: Tensor
    index: Tensor


def extract_features(
    session: Session,
    backbone: nn.Module,
    source: Source,
    evaluation: Evaluation,
    *,
    max_images: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Embed the centre crop of each image (PAPER.md section 6) with the backbone in eval mode.

    Restores the backbone's training mode. Leaves out undecodable images, which the log names. Each rank embeds a part
    of the images; all ranks return the features of all images, in the same order.

    Args:
        session: device, precision, decoder and ranks.
        backbone: maps [B, 3, S, S] to [B, D].
        source: the images.
        evaluation: resize and crop.
        max_images: take at most this many, evenly spaced; None takes all.
        progress: called with the number of images done by this rank; an exception ends the extraction.

    Raises:
        InputError: too many images cannot be decoded, the storage is damaged, or features are not finite.
        OtherRankFailed: another rank failed.
    """
    world = session.world
    indices = np.arange(len(source))
    if max_images is not None and max_images < len(source):
        indices = np.linspace(0, len(source) - 1, max_images).round().astype(np.int64)
    part = indices[world.rank :: world.size]
    part = part if len(part) else indices[:1]  # a rank without images embeds the first one too
    mine = world.run_on_all(lambda: _extract(session, backbone, source, evaluation, part, progress))
    counts = world.gather_objects((len(part), len(mine.index)))
    images = sum(count for count, _ in counts)
    world.run_on_all(lambda: _check_decodable(source, images, bad=images - sum(embedded for _, embedded in counts)))
    if world.size == 1:
        return mine
    index = world.gather_rows(mine.index.to(session.device))  # in the order of the ranks
    _, first = np.unique(index.cpu().numpy(), return_index=True)
    order = torch.from_numpy(first).to(session.device)
    return Features(
        values=world.gather_rows(mine.values)[order],
        labels=world.gather_rows(mine.labels)[order],
        index=index[order].cpu(),
    )


def _extract(
    session: Session,
    backbone: nn.Module,
    source: Source,
    evaluation: Evaluation,
    indices: NDArray[np.int64],
    progress: Callable[[int], None] | None,
) -> Features:
    """Features in the order of `indices`."""
    values: list[Tensor] = []
    labels: list[Tensor] = []
    index: list[Tensor] = []
    done = 0
    with closing(embed(session, backbone, center_crops(session, source, evaluation, indices))) as embedded:
        for feature, batch_index, batch_labels in embedded:
            values.append(feature)
            labels.append(batch_labels)
            index.append(batch_index)
            done += len(batch_index)
            if progress is not None:
                progress(done)
    found = Features(values=torch.cat(values), labels=torch.cat(labels).to(session.device), index=torch.cat(index))
    finite = torch.isfinite(found.values).all(dim=1)
    if not bool(finite.all()):
        raise not_finite(source.key(int(found.index[int((~finite).nonzero()[0])])))
    return found


def cached_features(session: EvalSession, source: Source, name: str, *, drawn: int = 0, seed: int = 0) -> FeatureStore:
    """The features of a source on disk, in a folder named after their identity; missing ones are computed.

    Raises:
        InputError: too many images cannot be decoded, or features are not finite.
        OSError: the disk is full.
    """
    folder, identity = _cache_of(session, source, name, drawn=drawn, seed=seed)
    size = bytes_needed(len(source) * (1 + drawn), session.width, "float32")
    dtype: Dtype = "float32" if size <= FLOAT32_BYTES else "float16"
    return compute_store(session, source, folder, identity, dtype=dtype, drawn=drawn, seed=seed)


def is_cached(session: EvalSession, source: Source, name: str) -> bool:
    """Whether the features of all centre crops of a source are on the disk already."""
    folder, _ = _cache_of(session, source, name)
    try:
        state = np.load(folder / "state.npy", mmap_mode="r")
    except (OSError, ValueError):
        return False
    return state.shape == (len(source),) and not bool((state == MISSING).any())


def _cache_of(
    session: EvalSession, source: Source, name: str, *, drawn: int = 0, seed: int = 0
) -> tuple[Path, dict[str, Any]]:
    """The folder of cached features, and their identity."""
    evaluation = session.loaded.evaluation
    identity = {
        "weights": session.loaded.digest,
        "data": pixels_of(source),
        "resize": evaluation.resize,
        "crop": evaluation.crop,
        "drawn": drawn,
        "seed": seed if drawn else 0,
        "precision": str(session.autocast),
        **interpolated(evaluation),
    }
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return session.out / "features" / f"{name}-{digest}", identity


def compute_store(
    session: BackboneSession,
    source: Source,
    folder: Path,
    identity: dict[str, Any],
    *,
    dtype: Dtype,
    drawn: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> FeatureStore:
    """Open a store and compute its missing rows, with progress on the console; see `open_store` and `fill_store`."""
    rows = len(source) * (1 + drawn)
    store = open_store(
        folder,
        rows=rows,
        width=session.width,
        dtype=dtype,
        identity=identity,
        world=session.world,
        overwrite=overwrite,
    )
    missing = len(store.missing(range(rows)))
    if missing:
        size = bytes_needed(rows, session.width, dtype) / 2**20
        session.say(
            f"Computing {missing:,} of {rows:,} features of {source.location}, cached in {folder}: {size:,.0f} MiB"
        )
    progress = Progress(session.console, f"features of {source.location}", total=-(-missing // session.world.size))
    loaded = session.loaded
    fill_store(
        session, store, loaded.backbone, source, loaded.evaluation, drawn=drawn, seed=seed, progress=progress.add
    )
    return store


def load_features(
    session: EvalSession, store: FeatureStore, labels: NDArray[np.int64]
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [R, D], labels int64 [R] and dataset indices int64 [R] of the store's rows that are done.

    Features are on the device if they fit, else in host memory, else mapped from the disk; the others are on the
    device.
    """
    rows = np.flatnonzero(store.state == DONE)
    device = session.device
    memory = free_memory(device, processes=session.world.local_size)
    whole = len(rows) == len(store.state)
    values = torch.from_numpy(store.values if whole else store.values[rows])
    if device.type == "cuda" and values.nbytes < _MEMORY_FRACTION * memory.device:
        values = values.to(device)
    elif values.nbytes < _MEMORY_FRACTION * memory.host:
        values = values.clone()  # reads the mapped file
    image = torch.from_numpy(rows % len(labels))
    return values, torch.from_numpy(labels)[image].to(device), image.to(device)


def fill_store(
    session: Session,
    store: FeatureStore,
    backbone: nn.Module,
    source: Source,
    evaluation: Evaluation,
    *,
    drawn: int = 0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Compute the store's missing rows; each rank takes every size-th one.

    For N images the rows are N centre crops in dataset order, then N random views for each of `drawn`.

    Args:
        session: device, precision, decoder and ranks.
        store: N * (1 + drawn) rows.
        backbone: [B, 3, S, S] to [B, D], on the device.
        source: the images.
        evaluation: resize, crop and interpolation.
        drawn: random views per image, in addition to the centre crop.
        seed: of the random views.
        progress: called with the number of rows just added by this rank; an exception stops the work and keeps the
            rows so far.

    Raises:
        InputError: too many images cannot be decoded, the storage is damaged, or features are not finite.
        OtherRankFailed: another rank failed.
    """
    world, images = session.world, len(source)
    missing = [store.missing(range(view * images, (view + 1) * images)) for view in range(1 + drawn)]

    def fill(view: int, rows: NDArray[np.int64]) -> None:
        indices = rows - view * images
        if view == 0:
            batches = center_crops(session, source, evaluation, indices)
        else:
            batches = iterate_augmented(
                source,
                train_view(evaluation.crop, evaluation.interpolation),
                seed=seed,
                epoch=view - 1,
                batch_size=session.batch_size,
                device=session.device,
                decode=session.decode,
                indices=indices,
            )
        written = [rows[:0]]
        with closing(embed(session, backbone, batches)) as embedded:
            for feature, index, _ in embedded:
                written.append(view * images + index.numpy())
                store.write(written[-1], feature.cpu().numpy(), [source.key(i) for i in index.tolist()])
                if progress is not None:
                    progress(len(index))
        store.mark_bad(np.setdiff1d(rows, np.concatenate(written)))

    def fill_all() -> None:
        for view, rows in enumerate(missing):
            if len(mine := rows[world.rank :: world.size]):
                try:
                    fill(view, mine)
                finally:
                    store.save()

    world.run_on_all(fill_all)
    world.run_on_all(lambda: _check_decodable(source, images, bad=int((store.state[:images] == BAD).sum())))


def center_crops(
    session: Session, source: Source, evaluation: Evaluation, indices: NDArray[np.int64]
) -> Generator[EvaluationBatch, None, None]:
    """Batches of the centre crops of some images, on the session's device."""
    return iterate_center(
        source,
        resize=evaluation.resize,
        crop=evaluation.crop,
        batch_size=session.batch_size,
        interpolation=evaluation.interpolation,
        device=session.device,
        decode=session.decode,
        indices=indices,
    )


def train_view(size: int, interpolation: Interpolation = "bicubic") -> ViewSpec:
    """The training view of evaluations: random resized crop and flip (PAPER.md section 6)."""
    return ViewSpec(
        name="train",
        task="classify",
        size=size,
        area=(0.08, 1.0),  # of torchvision's RandomResizedCrop
        flip=0.5,
        jitter_p=0.0,
        jitter=(0.0, 0.0, 0.0, 0.0),
        grayscale=0.0,
        blur=0.0,
        blur_kernel=1,
        interpolation=interpolation,
    )


def embed(
    session: Session, backbone: nn.Module, batches: Generator[EvaluationBatch, None, None]
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """Embed batches with the backbone in eval mode.

    At the end, also an early one, closes the batches and restores the backbone's training mode.

    Yields:
        Features float32 [B, D] on the device; index and labels int64 [B] on the CPU.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        for view, index, labels in batches:
            with torch.no_grad(), session.autocasting():
                feature = backbone(view)  # [B, D]
            yield feature.float(), index, labels
    finally:
        batches.close()
        backbone.train(was_training)


def _check_decodable(source: Source, images: int, *, bad: int) -> None:
    """Refuse to measure the few images that a failing disk left, as if they were all."""
    if too_many_bad(bad, images):
        raise InputError(
            f"{bad} of the {images} images of {source.location} cannot be decoded, too many to evaluate the others: "
            "check the data (the log names them), or run mvssl-convert on it, which quarantines bad images."
        )
