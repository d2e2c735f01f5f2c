"""Runs a training from its recipe and options: start or resume, announce, train, conclude."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from mvssl.config.device import resolve_device
from mvssl.config.options import RunOptions, parse_time
from mvssl.config.recipe import Recipe
from mvssl.distributed import join_world
from mvssl.evaluate.frozen import FrozenBackbone, load_backbone
from mvssl.evaluate.pages.write import write_after_run
from mvssl.evaluate.session import Session
from mvssl.monitor.collapse import Collapsed
from mvssl.monitor.pictures import write_view_sheet
from mvssl.monitor.report import write_report
from mvssl.optim.schedule import learning_rate
from mvssl.ranks import LAUNCHED, asked_devices, process_local_rank, rank_count
from mvssl.runs.changes import describe_changes, with_names_of
from mvssl.runs.data_record import DataRecord
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_metrics, values_of
from mvssl.runs.run_log import run_log
from mvssl.training.arguments import NOTHING_GIVEN, GivenData, given_data, recipe_and_options
from mvssl.training.callbacks import Hook, hooks_of
from mvssl.training.experiment import Experiment, Position, open_experiment
from mvssl.training.loop import Loop
from mvssl.training.memory import explain_out_of_memory
from mvssl.training.monitor import Diverged, Monitor
from mvssl.training.shutdown import Interrupted, StopRequest
from mvssl.weights.init_from import init_from
from mvssl.weights.pretrained import resolve_pretrained
from pipelines.names import NAME, visible
from pipelines.progress import counted, rate
from pipelines.runtime import InputError, steady
from pipelines.storage import Source, check_outside, split_paths
from pipelines.views.spec import sizes_by_task

logger = logging.getLogger("mvssl")
_TRAINING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a finished run.

    Attributes:
        out: the run folder.
        steps: optimiser steps of the whole run.
        knn: last kNN top-1 accuracy in [0, 1] for each k; empty if there are no labels.
        probe: last top-1 accuracy in [0, 1] of the online linear probe; None if there are no labels.
        best_step: step of the checkpoint that is kept as `checkpoints/best`; None if there is none.
        images_per_second: source images per second of training, without evaluations and saves.
        data_wait: fraction of the training time the step waited for a batch, without the wait for the first one.
        stopped_by: name of the callback that ended the run before its last step; None if none did.
    """

    out: Path
    steps: int
    knn: dict[int, float]
    images_per_second: float
    data_wait: float
    stopped_by: str | None = None
    probe: float | None = None
    best_step: int | None = None

    def curves(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Steps [N] and values [N] of every logged metric, by name: loss, loss/global, lr, knn/top1, probe/top1, ..."""
        if not RunFolder(self.out).metrics.exists():
            raise InputError(
                f"{self.out} has no metrics.jsonl any more: put the run folder back, or train again.", field="out"
            )
        points: dict[str, list[tuple[int, float]]] = {}
        for row in read_metrics(RunFolder(self.out).metrics):
            for name, value in values_of(row).items():
                points.setdefault(name, []).append((row["step"], value))
        return {
            name: (np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=np.float64))
            for name, pairs in points.items()
        }

    def backbone(
        self,
        *,
        network: Literal["online", "target"] | None = None,
        checkpoint: str | int = "last",
        device: str | torch.device = "cpu",
    ) -> FrozenBackbone:
        """The trained backbone, frozen and in eval mode, with its `transform`.

        Args:
            network: "online" (the default, as mvssl-export writes it) or "target".
            checkpoint: "last", "best" (`checkpoints/best`), or a step that is kept.
            device: where it is; auto takes CUDA if available.
        """
        return load_backbone(self.out, network=network, checkpoint=checkpoint, device=device)


def train(
    recipe: Recipe | str | Path | None = None,
    *unnamed: object,
    data: object = None,
    out: str | Path | None = None,
    val: object = None,
    callbacks: object = None,
    **settings: Any,
) -> TrainResult:
    """Pre-train a backbone.

    Args:
        recipe: a `Recipe`, the name of one (`mvssl-train --list`), or a recipe file; by default "photos", fitted to the
            images and the device.
        data: the images: a path (a folder, a text list, converted data), a list of paths of files and folders, a list
            of (path, label), a list or uint8 array of images, a map-style Dataset of torch, or a Dataset or DatasetDict
            of Hugging Face's `datasets`. Items are an image, (image, label), or a mapping such as {"image": ...,
            "label": ...}; an image is one of Pillow, uint8 pixels [H, W, C] or [C, H, W], encoded bytes, or a path.
            `pipelines.source_of` says more.
        out: the run folder.
        val: labelled images for the online kNN, in any of these forms; by default DATA/val if it exists.
        callbacks: one of, or a list of: an object with any of the methods `on_step_end`, `on_epoch_end` and `on_save`,
            a mapping of these names to functions, or a function, which is called after every step. They are called on
            rank 0 with a `TrainState`. One that returns True or raises `StopTraining` saves and ends the run; one that
            raises anything else saves, ends the run and raises `CallbackFailed`.
        settings: any other field of `Recipe` or `RunOptions`, such as epochs=50, batch_size=256, seed=1, device="cpu",
            resume=True. Fields within a field are given by a mapping or with two underscores:
            backbone={"name": "resnet18"}, optimizer__base_lr=0.3; of a view, by its number or name,
            views__0__area=(0.4, 1). They override the recipe's.
            view_preset="microscopy", "aerial" and others adapt the recipe's views to such pictures
            (`pipelines.adapt_views`).

    Returns:
        What the run gave: `curves()`, `backbone()`, and the attributes of `TrainResult`.

    In a script started by torchrun every process calls this; together they are one run. `devices` of the command
    mvssl-train starts processes; here it may only repeat their number.

    Raises:
        InputError: an argument cannot be used.
        CallbackFailed: a callback raised; the run is saved.
        Interrupted: SIGINT, SIGTERM or SIGHUP came, or the time is over; everything is saved.
        Diverged: the loss became NaN or infinite.
        Collapsed: the embeddings stayed collapsed; everything is saved.
        OtherRankFailed: another rank failed, and reports why, or is gone.
    """
    hooks = hooks_of(callbacks)
    given, places = given_data(data, val)
    chosen, options, notes = recipe_and_options(recipe, unnamed, {**places, "out": out, **settings}, given=given)
    if options.out is not None:  # a callback, or who uses the result, may change the working directory
        options = replace(options, out=options.out.absolute())
    return run(chosen, options, notes=notes, given=given, hooks=hooks)


def run(
    recipe: Recipe,
    options: RunOptions,
    *,
    console: Console | None = None,
    notes: Sequence[str] = (),
    given: GivenData = NOTHING_GIVEN,
    hooks: Mapping[str, tuple[Hook, ...]] = MappingProxyType({}),
) -> TrainResult:
    """Train `recipe` with `options`; see `train`. The log has `notes` after its first line."""
    if options.out is None:
        raise InputError("out is missing: name the run folder with --out PATH.")
    _check_devices(options)
    if not _TRAINING.acquire(blocking=False):
        raise InputError(
            "Another training runs in this process and both would use its random generators: wait until it is done, or "
            "start this one in a process of its own."
        )
    try:
        return _run(recipe, options, options.out, console, notes, given, hooks)
    finally:
        _TRAINING.release()


def _check_devices(options: RunOptions) -> None:
    """Refuse several devices in a process that is one alone: a function cannot start the script around it again."""
    if options.devices is None or LAUNCHED in os.environ:
        return
    asked = asked_devices(options.devices)
    if asked.indices is None and asked.count == rank_count():
        return
    count = "N" if asked.count is None else asked.count
    raise InputError(
        f"devices is {options.devices!r} but this process is one of {rank_count()}, and mvssl.train starts no others: "
        f"start the script with torchrun --standalone --nproc-per-node {count} SCRIPT, or train with the command "
        f"mvssl-train and --devices {options.devices}; device='cuda:1' chooses a single GPU.",
        field="devices",
    )


def _run(
    recipe: Recipe,
    options: RunOptions,
    out: Path,
    console: Console | None,
    notes: Sequence[str],
    given: GivenData,
    hooks: Mapping[str, tuple[Hook, ...]],
) -> TrainResult:
    """As `run`, which admits one training at a time."""
    began, folder = time.monotonic(), RunFolder(out)
    device = resolve_device(options.device, local_rank=process_local_rank())
    with join_world(cuda=device.type == "cuda") as world:
        console = (console or Console(file=steady(sys.stdout))) if world.is_rank0 else Console(quiet=True)
        with ExitStack() as stack:
            asked, recipe = recipe, world.run_on_rank0(partial(_claim, folder, recipe, options, stack))
            if world.is_rank0:
                stack.callback(folder.sync)
            open_log = stack.enter_context(run_log(console, rank=world.rank))
            with explain_out_of_memory(recipe, options, ranks=world.size, begun=folder.config.exists):
                experiment = stack.enter_context(open_experiment(recipe, options, console, world, given))
            start = _start_or_resume(experiment, folder)
            start = replace(start, notes=(*notes, *start.notes))
            position = start.position
            seconds = None if options.time is None else parse_time(options.time) - (time.monotonic() - began)
            open_log(folder.log)
            with StopRequest(world, seconds=seconds) as stop:
                _announce(experiment, folder, start)
                if with_names_of(asked, recipe) != recipe:
                    logger.info("the run keeps the names that it was started with: %s", recipe.name)
                if position.step == 0:
                    images = experiment.order.permutation(0)[:4]
                    world.run_on_rank0(lambda: write_view_sheet(recipe, experiment.source, images, folder.views))
                with (
                    explain_out_of_memory(recipe, options, ranks=world.size, begun=folder.config.exists),
                    Monitor(experiment, folder, console, position) as monitor,
                ):
                    loop = Loop(experiment, folder, position, monitor, stop, hooks)
                    try:
                        loop.run()
                    except (Interrupted, Diverged, Collapsed) as error:
                        monitor.summarise(step=loop.step, stopped_by=error.stopped_by)
                        raise
                    return _conclude(loop)


def _claim(folder: RunFolder, recipe: Recipe, options: RunOptions, stack: ExitStack) -> Recipe:
    """Lock the run folder, created if need be, and check that the run may start or resume in it; the run's recipe.

    Nothing in the folder is touched before it is locked, and no work is done before it is checked.
    """
    if options.data is not None and options.data.is_dir():
        train, found = split_paths(options.data)
        for images in filter(None, (train, options.val or found)):
            check_outside(folder.path, images, field="out")

    def check() -> Recipe:
        if options.resume:
            return folder.check_same_recipe(recipe, extend=options.extend)
        folder.check_free(overwrite=options.overwrite)
        return resolve_pretrained(recipe, init_from=options.init_from)

    check()  # creates nothing where nothing may be written
    stack.enter_context(folder.claim())
    recipe = check()  # again: another process may have been here before the lock was ours
    if options.resume:
        folder.check_files()
        folder.restore_config()
    return recipe


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where a run starts or resumes.

    Attributes:
        position: where it stands.
        earlier_epochs: number of epochs before it was extended; None if it is not.
        notes: what the user should know of it, for the log.
    """

    position: Position
    earlier_epochs: int | None = None
    notes: tuple[str, ...] = ()


def _start_or_resume(experiment: Experiment, folder: RunFolder) -> _Start:
    """Restore the run in the folder, or create the folder of a new one."""
    recipe, options, world = experiment.recipe, experiment.options, experiment.world
    if options.resume and world.run_on_rank0(folder.has_checkpoint):
        return _resume(experiment, folder, experiment.restore(folder))
    # A run that was stopped before its first checkpoint starts again.
    weights = world.run_on_rank0(lambda: folder.option("init_from")) if options.resume else options.init_from
    taken = init_from(experiment.step.online, experiment.step.target, recipe, weights)
    notes = () if taken is None else (taken,)
    if options.resume:
        world.run_on_rank0(lambda: experiment.check_images(folder, None))
        begun = replace(experiment.computed, recipe=world.run_on_rank0(folder.recipe))
        return _resume(experiment, folder, Position(before=begun), notes=notes)
    plain: dict[str, Any] = {  # absolute paths, so that they hold in any working directory
        name: str(value.resolve()) if isinstance(value, Path) else value for name, value in asdict(options).items()
    }
    plain["remote"] = {
        name: str(value) if isinstance(value, Path) else value for name, value in plain["remote"].items()
    }
    if taken is not None:
        plain["initial_weights"] = taken  # for the report
    world.run_on_rank0(
        lambda: folder.create(recipe, plain, DataRecord.of(experiment.source), overwrite=options.overwrite)
    )
    return _Start(position=Position(), notes=notes)


def _resume(experiment: Experiment, folder: RunFolder, position: Position, *, notes: tuple[str, ...] = ()) -> _Start:
    """Record what changes from this position on, if the run is not finished."""
    before, step = position.before, position.step
    if before is None:
        return _Start(position=position, notes=notes)
    batchnorm = any(name.endswith("running_mean") for name, _ in experiment.step.online.named_buffers())
    changes = describe_changes(before, experiment.computed, step=step, batchnorm=batchnorm)
    if changes and step == experiment.total_steps and position.evaluated:
        return _Start(position=position, notes=("the run is finished, so that changes of its recipe have no effect",))
    earlier = experiment.world.run_on_rank0(lambda: folder.update(experiment.recipe, before=before.recipe, step=step))
    return _Start(position=position, earlier_epochs=earlier, notes=(*notes, *changes))


def _announce(experiment: Experiment, folder: RunFolder, start: _Start) -> None:
    """Log what is about to run."""
    step, earlier_epochs = start.position.step, start.earlier_epochs
    recipe, order, ranks = experiment.recipe, experiment.order, experiment.world.size
    per_rank = f" ({recipe.batch_size // ranks} on each of {ranks} processes)" if ranks > 1 else ""
    logger.info(
        "%s %s: %s, %s in %s, %d views an image (%s pixels), batch %d%s, %s of %s (%s), on %s with %s",
        "Resuming" if step else "Training",
        recipe.name,
        recipe.backbone.name,
        describe_images(experiment.source),
        experiment.source.location,
        len(recipe.views),
        ", ".join(f"{visible(task or 'target', NAME)} {size}" for task, size in sizes_by_task(recipe.views).items()),
        recipe.batch_size,
        per_rank,
        counted(recipe.epochs, "epoch"),
        counted(order.steps_per_epoch, "step"),
        f"{experiment.total_steps:,}",
        experiment.device,
        experiment.loader.decoder_name,
    )
    if step:
        logger.info("from step %d of %d", step, experiment.total_steps)
    if experiment.step.compiled:
        logger.info("compiling: the first step takes longer, up to some minutes, unless its code is cached")
    if experiment.cache:
        logger.info("%s", experiment.cache)
    if recipe.accumulate > 1:
        logger.info(
            "gradient accumulation: %d micro-batches of %d images; same numbers as %d processes "
            "(BatchNorm is computed per micro-batch)",
            recipe.accumulate,
            recipe.batch_size // ranks // recipe.accumulate,
            ranks * recipe.accumulate,
        )
    if experiment.options.step_mode == "joint" and experiment.step.view_by_view is not None:
        logger.info(
            "sequential views, slower than batched ones: %s has batch statistics that cannot be computed per view",
            experiment.step.view_by_view,
        )
    for note in (*start.notes, *experiment.notes):
        logger.info("%s", note)
    if recipe.evaluation.every_epochs and not experiment.evaluates:
        logger.info("collapse is still detected, by the embeddings' standard deviation and effective rank")
    logger.info("run folder: %s", folder.path)
    if earlier_epochs is not None:
        logger.info(
            "extended from %d to %d epochs: the learning rate continues at %.3g (it had decayed to %.3g) on the longer "
            "cosine schedule",
            earlier_epochs,
            recipe.epochs,
            *(_learning_rate(experiment, step, epochs) for epochs in (recipe.epochs, earlier_epochs)),
        )


def describe_images(source: Source) -> str:
    """Number of images and classes, e.g. "48 images of 2 classes (a 24, b 24)"."""
    images = f"{len(source):,} images"
    labelled = source.labels[source.labels >= 0]
    if not len(labelled):
        return f"{images} without labels"
    labels, counts = np.unique(labelled, return_counts=True)
    if len(labels) <= 4:
        names = (visible(source.classes[label], NAME) for label in labels)
        each = ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
    else:
        each = f"{counts.min():,} to {counts.max():,} each" if counts.min() < counts.max() else f"{counts[0]:,} each"
    missing = len(source) - len(labelled)
    return (
        f"{images} of {len(labels):,} {'classes' if len(labels) > 1 else 'class'} ({each}"
        + (f"; {missing:,} without a label" if missing else "")
        + ")"
    )


def _learning_rate(experiment: Experiment, step: int, epochs: int) -> float:
    """Learning rate at a step of a run of this many epochs."""
    config, per_epoch = experiment.recipe.optimizer, experiment.order.steps_per_epoch
    peak = config.base_lr * experiment.recipe.batch_size / 256
    return learning_rate(step, epochs * per_epoch, config.warmup_epochs * per_epoch, peak, config.final_lr_factor)


def _write_pages(loop: Loop) -> None:
    """Write the pages of what was learned, if the run was long enough for their cost."""
    experiment, folder = loop.experiment, loop.folder
    recipe = experiment.recipe
    session = Session(
        device=experiment.device,
        autocast=experiment.step.autocast_dtype,
        decode=experiment.options.decode,
        batch_size=min(64, recipe.batch_size),
    )
    written = write_after_run(
        session,
        experiment.step.online.backbone,
        experiment.source,
        recipe.evaluation,
        folder,
        trained=loop.step * recipe.batch_size,
        about=f"{recipe.backbone.name}, {recipe.name}, step {loop.step:,}, run {folder.path}; training images.",
    )
    if written:
        logger.info("what was learned, on some images: %s", ", ".join(written))


def _conclude(loop: Loop) -> TrainResult:
    """Log the result of a finished run and write its report."""
    experiment, folder = loop.experiment, loop.folder
    loop.monitor.plot()
    summary = loop.monitor.summarise(step=loop.step, stopped_by=loop.stopped_by)
    if summary.images_per_second == 0:
        logger.info("the run was already finished, at step %d", loop.step)
    else:
        logger.info(
            "%s: %d steps at %s source images/s (%s views/s); %s",
            "done" if loop.stopped_by is None else f"ended by the callback {loop.stopped_by}, and can be resumed",
            loop.step,
            rate(summary.images_per_second),
            rate(summary.images_per_second * len(experiment.recipe.views)),
            summary.bottleneck,
        )
        bad = summary.bad_images
        if bad:
            replaced = f"{counted(len(bad), 'image')} could not be decoded and {'were' if len(bad) > 1 else 'was'}"
            logger.warning("%s replaced, e.g. %s", replaced, next(iter(bad)))
        logger.info("backbone: %s; report: %s", folder.backbone, folder.report)
    if experiment.world.is_rank0:
        if summary.images_per_second:
            _write_pages(loop)
        try:
            write_report(folder.report, folder)
        except (OSError, InputError) as error:  # everything that matters is saved
            logger.warning("%s could not be written: %s", folder.report, error)
    return TrainResult(
        out=folder.path,
        steps=loop.step,
        knn=loop.knn,
        images_per_second=summary.images_per_second,
        data_wait=summary.data_wait,
        stopped_by=loop.stopped_by,
        probe=loop.probe,
        best_step=loop.best,
    )
