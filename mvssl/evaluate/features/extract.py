"""Features of a data set: the frozen backbone's output for the centre crop of every image."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvssl.distributed import World
from mvssl.recipe import Evaluation
from pipelines.decode import DecodeOptions
from pipelines.errors import InputError
from pipelines.evaluation import EvaluationBatch, iterate_center
from pipelines.loading.substitute import too_many_bad
from pipelines.storage.source import Source


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
    """Embed the centre crop of each image (SPEC section 6) with the backbone in eval mode.

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
        FailedElsewhere: another rank failed.
    """
    world = world or World()
    indices = np.arange(len(source))
    if max_images is not None and max_images < len(source):
        indices = np.linspace(0, len(source) - 1, max_images).round().astype(np.int64)
    share = indices[world.rank :: world.size]
    mine = world.together(
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
    world.together(lambda: check_enough(images, bad=bad, source=source))
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


def not_finite(key: str) -> InputError:
    """What to say of an image whose features are NaN or infinite."""
    return InputError(
        f"The features of {key} are not finite numbers (NaN or infinite): the weights have diverged, or the number "
        "format is too narrow for them; try --precision fp32, or another checkpoint."
    )
