"""What an evaluation runs with: device, ranks and console, then a backbone, then images and a result folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from mvssl.config.device import autocast_dtype, resolve_device
from mvssl.config.evaluation import BackboneSource
from mvssl.config.evaluation import ComputeOptions as ComputeOptions
from mvssl.config.evaluation import EvalOptions as EvalOptions
from mvssl.config.recipe import Evaluation
from mvssl.distributed import World, join_world
from mvssl.models.backbones import feature_width
from mvssl.ranks import process_local_rank, rank_count
from mvssl.runs.results import ResultFile, locked_folder
from mvssl.weights.load import LoadedBackbone, load_backbone
from pipelines.decode import DecodeOptions, ImageLimits
from pipelines.loading.deep_images import pixels_of, state_value_range
from pipelines.names import say
from pipelines.progress import Progress
from pipelines.runtime import InputError
from pipelines.storage import RemoteOptions, align_labels, check_outside, open_source, split_paths
from pipelines.storage.source import Source
from pipelines.value_range import ValueRange, parse_value_range


@dataclass(frozen=True, kw_only=True)
class Session:
    """Where and how images are embedded.

    Attributes:
        device: of the backbone.
        autocast: dtype of the forward; None uses the weights' own.
        decode: decoder options; None for the defaults.
        batch_size: images per forward of a frozen backbone.
        world: the ranks, which share the work.
        console: for messages; silent on ranks other than 0.
        stated_range: range of values of images with more than 8 bits, by the user; None if not stated.
        run_range: that of the run; taken where neither the user nor the data state one.
        limits: of images; None for the defaults.
        remote: how data at a URL are read and cached; None for the defaults.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    decode: DecodeOptions | None = None
    batch_size: int = 256
    world: World = field(default_factory=World)
    console: Console = field(default_factory=lambda: Console(quiet=True))
    stated_range: ValueRange | None = None
    run_range: ValueRange | None = None
    limits: ImageLimits | None = None
    remote: RemoteOptions | None = None

    def autocasting(self) -> torch.autocast:
        """The context of a forward."""
        return torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def say(self, line: str) -> None:
        """Print a line without wrapping."""
        say(self.console, line)


@dataclass(frozen=True, kw_only=True)
class BackboneSession(Session):
    """A session with a loaded backbone on its device.

    Attributes:
        loaded: the backbone and what is known of it.
        width: D of its features.
    """

    loaded: LoadedBackbone
    width: int

    def conditions(self, *, head_std: float | None = None) -> dict[str, Any]:
        """The crop and network of a result, and the start of its linear layer, for people.

        `head_std` is the standard deviation of the layer's initial weights; None without such a layer.
        """
        evaluation = self.loaded.evaluation
        start = {} if head_std is None else {"head_start": f"normal(0, {head_std:g})" if head_std else "zero"}
        return {
            "resize": evaluation.resize,
            "crop": evaluation.crop,
            "interpolation": evaluation.interpolation,
            "network": self.loaded.network,
            **start,
        }


@dataclass(frozen=True, kw_only=True)
class EvalSession(BackboneSession):
    """A session with images and a result folder.

    Attributes:
        train: images to learn from.
        val: images to measure on; None if there are none.
        out: result folder.
        overwrite: whether other results there may be replaced.
    """

    train: Source
    val: Source | None
    out: Path
    overwrite: bool

    def check_picture(self, path: Path) -> Path:
        """The place of a picture; raises InputError if it would become one of the images."""
        for source in filter(None, (self.train, self.val)):
            check_outside(path.parent, Path(source.location), field="out")
        return path

    def identity(self, protocol: str, **settings: Any) -> dict[str, Any]:
        """What a result depends on; two results with the same identity are equal."""
        return {
            "protocol": protocol,
            "backbone": self.loaded.architecture,
            "weights": self.loaded.digest,
            "train": pixels_of(self.train),
            "val": None if self.val is None else pixels_of(self.val),
            "resize": self.loaded.evaluation.resize,
            "crop": self.loaded.evaluation.crop,
            **interpolated(self.loaded.evaluation),
            **settings,
        }

    def measure_once(
        self,
        evaluation: str,
        identity: dict[str, Any],
        measure: Callable[[], dict[str, Any]],
        *,
        head_std: float | None = None,
    ) -> tuple[dict[str, Any], Path]:
        """The result of an evaluation and its file; measured only if there is no result of this identity.

        The file states the `conditions`, of which `head_std` is one.

        Raises:
            InputError: the file holds a result of another identity and may not be replaced.
        """
        file = ResultFile(
            folder=self.out,
            evaluation=evaluation,
            network=self.loaded.name,
            identity=identity,
            overwrite=self.overwrite,
            conditions=self.conditions(head_std=head_std),
        )
        results = self.world.run_on_rank0(file.earlier)
        if results is None:
            results = measure()
            self.world.run_on_rank0(partial(file.write, results))
        return results, file.path

    def labelled_val(self) -> tuple[Source, NDArray[np.int64]]:
        """The validation images, and their labels int64 [len(val)] in the numbering of train's classes.

        Raises:
            InputError: there are no validation images, or they have a class that train lacks.
        """
        if self.val is None:
            raise InputError(
                f"{self.train.location} has no validation split: give labelled images to measure on with --val PATH."
            )
        return self.val, align_labels(self.val, self.train.classes)


def interpolated(evaluation: Evaluation) -> dict[str, Any]:
    """The interpolation, for identities; empty for bicubic, which identities of earlier versions do not state."""
    return {} if evaluation.interpolation == "bicubic" else {"interpolation": evaluation.interpolation}


def check_labelled(evaluation: str, *sources: Source | None) -> None:
    """Check that all images have labels, of two classes or more, and that there are at least as many as classes."""
    for source in sources:
        if source is None:
            continue
        missing = int((source.labels < 0).sum())
        if missing:
            raise InputError(
                f"{evaluation} needs labels but {missing:,} of the {len(source):,} images of {source.location} have "
                "none: put the images into one folder per class."
            )
        present = np.unique(source.labels)
        if len(present) < 2:
            raise InputError(
                f"{evaluation} needs images of two classes or more but all {len(source):,} of {source.location} are of "
                f"the class {source.classes[present[0]]!r}: put the images into one folder per class."
            )
        if len(source) < len(source.classes):
            raise InputError(
                f"{source.location} has {len(source)} images for {len(source.classes)} classes: give at least one "
                "image of each."
            )


@contextmanager
def open_backbone(source: BackboneSource, compute: ComputeOptions) -> Iterator[BackboneSession]:
    """Load a backbone onto its device, on every rank that torchrun started.

    Raises:
        InputError: something is missing, damaged or does not fit.
    """
    device = resolve_device(compute.device, local_rank=process_local_rank() if rank_count() > 1 else None)
    with join_world(cuda=device.type == "cuda") as world:
        loaded = world.run_on_all(lambda: load_backbone(source))
        width = feature_width(loaded.backbone, [loaded.evaluation.crop], name=loaded.architecture)
        loaded.backbone.to(device)
        of_run = "auto" if loaded.recipe is None else loaded.recipe.precision
        yield BackboneSession(
            device=device,
            autocast=autocast_dtype(of_run if compute.precision == "auto" else compute.precision, device),
            decode=DecodeOptions(decoder=compute.decoder, threads=compute.threads),
            batch_size=compute.extract_batch,
            world=world,
            console=Console(quiet=not world.is_rank0),
            stated_range=None if compute.value_range is None else parse_value_range(compute.value_range),
            run_range=_run_range(loaded),
            limits=compute.limits,
            remote=compute.remote,
            loaded=loaded,
            width=width,
        )


@contextmanager
def open_session(source: BackboneSource, options: EvalOptions, compute: ComputeOptions) -> Iterator[EvalSession]:
    """Load a backbone, open the images and lock the result folder.

    Raises:
        InputError: something is missing, damaged or does not fit.
    """
    with open_backbone(source, compute) as session, ExitStack() as stack:
        folder = session.loaded.folder
        out = options.out or (None if folder is None else folder.evaluations)
        if out is None:
            raise InputError("out is missing: name a folder for the results with --out PATH.")
        if session.world.is_rank0:
            stack.enter_context(locked_folder(out))
        train_path, val_path = _data_paths(session.loaded, options, compute.remote)
        train = open_images(train_path, session)
        stack.callback(train.close)
        val = None
        if val_path is not None:
            val = open_images(val_path, session)
            stack.callback(val.close)
        yield EvalSession(**vars(session), train=train, val=val, out=out, overwrite=options.overwrite)


def open_images(path: Path, session: Session) -> Source:
    """Open images; rank 0 indexes the folder first."""
    progress = Progress(session.console, f"indexing {path}").update

    def opened() -> Source:
        source = open_source(path, progress=progress, remote=session.remote)
        state_value_range(source, session.stated_range, default=session.run_range, limits=session.limits)
        return source

    return session.world.run_on_rank0_first(opened)


def _run_range(loaded: LoadedBackbone) -> ValueRange | None:
    """The range of values that the backbone's run was trained with; None if it is of no run, or needed none."""
    text = None if loaded.folder is None else loaded.folder.options().get("value_range")
    return None if text is None else parse_value_range(text)


def _data_paths(loaded: LoadedBackbone, options: EvalOptions, remote: RemoteOptions) -> tuple[Path, Path | None]:
    """Training and validation images."""
    path = options.data or (None if loaded.folder is None else loaded.folder.option("data"))
    if path is None:
        where = "" if loaded.folder is None else f"{loaded.folder.config} names no data set: "
        raise InputError(f"{where}data is missing: give labelled images with --data PATH.")
    train, val = split_paths(path, remote=remote)
    if options.data is None and loaded.folder is not None:
        val = loaded.folder.option("val") or val
    return train, options.val or val
