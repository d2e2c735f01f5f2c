"""What every evaluation begins with: the backbone on its device, the images, and a folder of its own.

Where and how an evaluation computes features.

How many images are classified right, and how sure that number is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from mvssl.config.options import autocast_dtype, resolve_device
from mvssl.distributed import World, join_world, process_local_rank, rank_count
from mvssl.models.backbones import feature_width
from mvssl.monitor.console import Progress
from mvssl.runs.results import ResultFile, claimed
from mvssl.weights.load import Measured, Subject, load_subject
from pipelines.decode import DecodeOptions, DecoderName
from pipelines.runtime import InputError, invalid
from pipelines.storage import align_labels, open_source, split_paths
from pipelines.storage.source import Source


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Where and how features are computed.

    Attributes:
        device: auto takes CUDA where there is one.
        decoder: auto takes DALI where it is installed.
        threads: threads that decode.
        precision: number format of the backbone; auto is bf16 on CUDA and fp32 on the CPU.
        extract_batch: images the backbone takes at a time.
    """

    device: str = "auto"
    decoder: DecoderName = "auto"
    threads: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    extract_batch: int = 256

    def __post_init__(self) -> None:
        if self.extract_batch < 1:
            raise invalid("extract_batch", self.extract_batch, "at least 1", "give a positive number")
        if self.threads is not None and self.threads < 1:
            raise invalid("threads", self.threads, "at least 1", "give a positive number")

    @property
    def decode(self) -> DecodeOptions:
        """Who decodes."""
        return DecodeOptions(decoder=self.decoder, threads=self.threads)


_NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of a classification of labelled images.

    Attributes:
        top1: share of images whose class has the highest score, in [0, 1].
        top5: share whose class is among the five highest; None where there are at most five classes or no scores.
        low: lower end of the 95 % confidence interval of `top1`.
        high: its upper end.
        images: how many there are.
        per_class: top-1 of the images of each class that has any, by its name.
    """

    top1: float
    top5: float | None
    low: float
    high: float
    images: int
    per_class: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "top1_interval_95": [self.low, self.high],
            "images": self.images,
            "per_class": self.per_class,
        }


def accuracy_of(ranked: Tensor, labels: Tensor, classes: Sequence[str]) -> Accuracy:
    """Compare predictions with labels.

    Args:
        ranked: int64 [M, R], the classes of each image, the best first; R is 1 or at least 5 for a top-5.
        labels: int64 [M], each 0 or more, on the same device.
        classes: names by label.
    """
    right = (ranked[:, 0] == labels).double()  # [M]
    top5 = None
    if ranked.shape[1] >= 5 and len(classes) > 5:
        top5 = float((ranked[:, :5] == labels[:, None]).any(dim=1).double().mean())
    count = torch.bincount(labels, minlength=len(classes))  # [C]
    hits = torch.bincount(labels, weights=right, minlength=len(classes))  # [C]
    low, high = wilson_interval(int(right.sum()), len(labels))
    return Accuracy(
        top1=float(right.mean()),
        top5=top5,
        low=low,
        high=high,
        images=len(labels),
        per_class={
            name: hit / of for name, hit, of in zip(classes, hits.tolist(), count.tolist(), strict=False) if of > 0
        },
    )


def wilson_interval(right: int, images: int) -> tuple[float, float]:
    """95 % confidence interval of a share, by Wilson's score (JASA 22, 1927): sound also near 0 and 1."""
    share, z2 = right / images, _NORMAL_95**2
    middle = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = _NORMAL_95 / (1 + z2 / images) * math.sqrt(share * (1 - share) / images + z2 / (4 * images**2))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Images and places of an evaluation.

    Attributes:
        data: labelled images; by default those the run was given. Its train/ and val/ are used where they exist.
        val: images to measure on; by default DATA/val, or the run's --val.
        out: folder for results and what they are made from; by default RUN/eval.
        overwrite: replace results of other data or settings that are there.
    """

    data: Path | None = None
    val: Path | None = None
    out: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A backbone that is ready, and what it needs to embed images.

    Attributes:
        measured: the backbone, on the device, in eval mode.
        width: D of its features.
        device: of the backbone.
        autocast: dtype it computes in; None for float32.
        computing: as given.
        world: the ranks.
        console: where to speak; other ranks than 0 are silent.
    """

    measured: Measured
    width: int
    device: torch.device
    autocast: torch.dtype | None
    computing: Computing
    world: World
    console: Console

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Session(Embedder):
    """An evaluation that has begun.

    Attributes:
        train: the images that are learned from.
        val: the images that are measured; None if there are none.
        out: folder of results.
        overwrite: whether other results there may be replaced.
    """

    train: Source
    val: Source | None
    out: Path
    overwrite: bool

    def identity(self, protocol: str, **settings: Any) -> dict[str, Any]:
        """What tells a result of this evaluation from others."""
        return {
            "protocol": protocol,
            "backbone": self.measured.architecture,
            "weights": self.measured.digest,
            "train": self.train.fingerprint,
            "val": None if self.val is None else self.val.fingerprint,
            "resize": self.measured.evaluation.resize,
            "crop": self.measured.evaluation.crop,
            **settings,
        }

    def result_file(self, evaluation: str, identity: dict[str, Any]) -> ResultFile:
        """Where the result of an evaluation of this network is kept."""
        return ResultFile(
            folder=self.out,
            evaluation=evaluation,
            network=self.measured.name,
            identity=identity,
            overwrite=self.overwrite,
        )

    def val_labels(self) -> NDArray[np.int64]:
        """int64 [len(val)]: labels of val by the classes of train.

        Raises:
            InputError: there is no val, or it has a class that train lacks.
        """
        if self.val is None:
            raise InputError(
                f"{self.train.location} has no validation part: give labelled images to measure on with --val PATH."
            )
        return align_labels(self.val, self.train.classes)


def check_labelled(what: str, *sources: Source | None) -> None:
    """Check that every image has a label.

    Raises:
        InputError: one has none, or there are fewer images than classes.
    """
    for source in sources:
        if source is None:
            continue
        missing = int((source.labels < 0).sum())
        if missing:
            raise InputError(
                f"{what} needs labels but {missing:,} of the {len(source):,} images of {source.location} have none: "
                "put the images into one folder per class."
            )
        if len(source) < len(source.classes):
            raise InputError(
                f"{source.location} has {len(source)} images for {len(source.classes)} classes: give at least one "
                "image of each."
            )


@contextmanager
def open_embedder(subject: Subject, computing: Computing) -> Iterator[Embedder]:
    """Load the backbone; all ranks that torchrun started take part.

    Raises:
        InputError: something is missing, damaged or does not fit; the message says what to do.
    """
    several = rank_count() > 1
    device = resolve_device(computing.device, local_rank=process_local_rank() if several else None)
    with join_world(cuda=device.type == "cuda") as world:
        measured = world.run_on_all(lambda: load_subject(subject))
        crop = measured.evaluation.crop
        width = feature_width(measured.backbone, [crop], name=measured.architecture)
        measured.backbone.to(device)
        precision = "auto" if measured.recipe is None else measured.recipe.precision
        precision = precision if computing.precision == "auto" else computing.precision
        yield Embedder(
            measured=measured,
            width=width,
            device=device,
            autocast=autocast_dtype(precision, device),
            computing=computing,
            world=world,
            console=Console(quiet=not world.is_rank0),
        )


@contextmanager
def open_session(subject: Subject, options: EvalOptions, computing: Computing) -> Iterator[Session]:
    """Load the backbone, open the images and claim the folder.

    Raises:
        InputError: something is missing, damaged or does not fit; the message says what to do.
    """
    with open_embedder(subject, computing) as embedder, ExitStack() as stack:
        world, measured = embedder.world, embedder.measured
        out = options.out or (None if measured.folder is None else measured.folder.evaluations)
        if out is None:
            raise InputError("out is missing: name a folder for the results with --out PATH.")
        if world.is_rank0:
            stack.enter_context(claimed(out))
        train_path, val_path = _paths(measured, options)
        train = open_images(train_path, embedder)
        stack.callback(train.close)
        val = None
        if val_path is not None:
            val = open_images(val_path, embedder)
            stack.callback(val.close)
        yield Session(**vars(embedder), train=train, val=val, out=out, overwrite=options.overwrite)


def open_images(path: Path, embedder: Embedder) -> Source:
    """Open images; rank 0 indexes a folder first."""
    progress = Progress(embedder.console, f"indexing {path}").update
    return embedder.world.run_on_rank0_first(lambda: open_source(path, progress=progress))


def _paths(measured: Measured, options: EvalOptions) -> tuple[Path, Path | None]:
    """Training and validation images."""
    path = options.data or (None if measured.folder is None else measured.folder.option("data"))
    if path is None:
        where = "" if measured.folder is None else f"{measured.folder.config} names no data set: "
        raise InputError(f"{where}data is missing: give labelled images with --data PATH.")
    train, val = split_paths(path)
    if options.data is None and measured.folder is not None:
        val = measured.folder.option("val") or val
    return train, options.val or val
