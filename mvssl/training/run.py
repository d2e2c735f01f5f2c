"""Runs a training from its recipe and options: start or resume, announce, train, conclude."""

from __future__ import annotations

import logging
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from mvssl.config.device import resolve_device
from mvssl.config.options import RunOptions, parse_time
from mvssl.config.recipe import Recipe
from mvssl.distributed import join_world, process_local_rank
from mvssl.monitor.pictures import write_view_sheet
from mvssl.monitor.report import write_report
from mvssl.optim.schedule import learning_rate
from mvssl.runs.data_record import DataRecord
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_jsonl
from mvssl.runs.run_log import run_log
from mvssl.training.arguments import recipe_and_options
from mvssl.training.experiment import Experiment, Position, open_experiment
from mvssl.training.loop import Loop
from mvssl.training.memory import explain_out_of_memory
from mvssl.training.monitor import Diverged, Monitor
from mvssl.training.shutdown import Interrupted, StopRequest
from mvssl.weights.init_from import init_from
from pipelines.runtime import InputError, steady
from pipelines.storage import Source, check_outside, split_paths

logger = logging.getLogger("mvssl")
_TRAINING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a finished run.

    Attributes:
        out: the run folder.
        steps: optimiser steps of the whole run.
        knn: last kNN top-1 accuracy in [0, 1] for each k; empty if there are no labels.
        images_per_second: source images per second of training, without evaluations and saves.
        data_wait: fraction of the training time the step waited for a batch, without the wait for the first one.
    """

    out: Path
    steps: int
    knn: dict[int, float]
    images_per_second: float
    data_wait: float

    def curves(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Steps [N] and values [N] of every logged metric, by name: loss, loss/global, lr, knn/top1, ..."""
        points: dict[str, list[tuple[int, float]]] = {}
        for row in read_jsonl(RunFolder(self.out).metrics):
            prefix = "" if row["kind"] == "train" else f"{row['kind']}/"
            for name, value in row.items():
                if name not in ("kind", "step", "epoch") and value is not None:
                    points.setdefault(prefix + name, []).append((row["step"], value))
        return {
            name: (np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=np.float64))
            for name, pairs in points.items()
        }


def train(
    recipe: Recipe | str | Path | None = None,
    *unnamed: object,
    data: str | Path | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> TrainResult:
    """Pre-train a backbone.

    Args:
        recipe: a `Recipe`, the name of one, or a recipe file.
        data: a folder of images, a text list or converted data.
        out: the run folder.
        settings: other fields of `RunOptions`, and fields of `Recipe` that override the recipe's.

    In a script started by torchrun every process calls this; together they are one run.

    Raises:
        InputError: an argument cannot be used.
        Interrupted: SIGINT, SIGTERM or SIGHUP came, or the time is over; everything is saved.
        Diverged: the loss became NaN or infinite.
        OtherRankFailed: another rank failed, and reports why, or is gone.
    """
    return run(*recipe_and_options(recipe, unnamed, {"data": data, "out": out, **settings}))


def run(recipe: Recipe, options: RunOptions, *, console: Console | None = None) -> TrainResult:
    """Train `recipe` with `options`; see `train`."""
    if options.out is None:
        raise InputError("out is missing: name the run folder with --out PATH.")
    if not _TRAINING.acquire(blocking=False):
        raise InputError(
            "Another training runs in this process and both would use its random generators: wait until it is done, or "
            "start this one in a process of its own."
        )
    try:
        return _run(recipe, options, options.out, console)
    finally:
        _TRAINING.release()


def _run(recipe: Recipe, options: RunOptions, out: Path, console: Console | None) -> TrainResult:
    """As `run`, which admits one training at a time."""
    began, folder = time.monotonic(), RunFolder(out)
    device = resolve_device(options.device, local_rank=process_local_rank())
    with join_world(cuda=device.type == "cuda") as world:
        console = (console or Console(file=steady(sys.stdout))) if world.is_rank0 else Console(quiet=True)
        with ExitStack() as stack:
            world.run_on_rank0(lambda: _claim(folder, recipe, options, stack))
            if world.is_rank0:
                stack.callback(folder.sync)
            experiment = stack.enter_context(open_experiment(recipe, options, console, world))
            position, earlier_epochs, weights = _start_or_resume(experiment, folder)
            seconds = None if options.time is None else parse_time(options.time) - (time.monotonic() - began)
            with run_log(folder.log, console, rank=world.rank), StopRequest(world, seconds=seconds) as stop:
                _announce(experiment, folder, position.step, earlier_epochs)
                if weights is not None:
                    logger.info("%s", weights)
                if position.step == 0:
                    images = experiment.order.permutation(0)[:4]
                    world.run_on_rank0(lambda: write_view_sheet(recipe, experiment.source, images, folder.views))
                with explain_out_of_memory(), Monitor(experiment, folder, console, position) as monitor:
                    loop = Loop(experiment, folder, position, monitor, stop)
                    try:
                        loop.run()
                    except (Interrupted, Diverged) as error:
                        monitor.summarise(step=loop.step, stopped_by=error.stopped_by)
                        raise
                    return _conclude(loop)


def _claim(folder: RunFolder, recipe: Recipe, options: RunOptions, stack: ExitStack) -> None:
    """Lock the run folder, created if need be, and check that the run may start or resume in it.

    Nothing in the folder is touched before it is locked, and no work is done before it is checked.
    """
    if options.data is not None and options.data.is_dir():
        train, found = split_paths(options.data)
        for images in filter(None, (train, options.val or found)):
            check_outside(folder.path, images, field="out")

    def check() -> None:
        if options.resume:
            folder.check_same_recipe(recipe, extend=options.extend)
        else:
            folder.check_free(overwrite=options.overwrite)

    check()  # creates nothing where nothing may be written
    stack.enter_context(folder.claim())
    check()  # again: another process may have been here before the lock was ours
    if options.resume:
        folder.restore_config()


def _start_or_resume(experiment: Experiment, folder: RunFolder) -> tuple[Position, int | None, str | None]:
    """Restore the run in the folder, or create the folder of a new one.

    Returns the position; if the run is being extended, its earlier number of epochs; and what was taken from the
    weights that it starts from, if it does.
    """
    recipe, options, world = experiment.recipe, experiment.options, experiment.world
    earlier_epochs = world.run_on_rank0(lambda: folder.extend(recipe)) if options.resume else None
    if options.resume and world.run_on_rank0(folder.has_checkpoint):
        return experiment.restore(folder), earlier_epochs, None
    # A run that was stopped before its first checkpoint starts again.
    weights = world.run_on_rank0(lambda: folder.option("init_from")) if options.resume else options.init_from
    taken = init_from(experiment.step.online, experiment.step.target, recipe, weights)
    if not options.resume:
        plain = {  # absolute paths, so that they hold in any working directory
            name: str(value.resolve()) if isinstance(value, Path) else value for name, value in asdict(options).items()
        }
        world.run_on_rank0(lambda: folder.create(recipe, plain, overwrite=options.overwrite))
        world.run_on_rank0(lambda: DataRecord.of(experiment.source).save(folder.data))
    return Position(), earlier_epochs, taken


def _announce(experiment: Experiment, folder: RunFolder, step: int, earlier_epochs: int | None) -> None:
    """Log what is about to run."""
    recipe, order, ranks = experiment.recipe, experiment.order, experiment.world.size
    per_rank = f" ({recipe.batch_size // ranks} on each of {ranks} processes)" if ranks > 1 else ""
    logger.info(
        "%s %s: %s, %s, %d views an image, batch %d%s, %d epochs of %d steps, on %s with %s",
        "Resuming" if step else "Training",
        recipe.name,
        recipe.backbone.name,
        describe_images(experiment.source),
        len(recipe.views),
        recipe.batch_size,
        per_rank,
        recipe.epochs,
        order.steps_per_epoch,
        experiment.device,
        experiment.loader.decoder_name,
    )
    if step:
        logger.info("from step %d of %d", step, experiment.total_steps)
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
    for note in experiment.notes:
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
        each = ", ".join(f"{source.classes[label]} {count:,}" for label, count in zip(labels, counts, strict=True))
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


def _conclude(loop: Loop) -> TrainResult:
    """Log the result of a finished run and write its report."""
    experiment, folder = loop.experiment, loop.folder
    loop.monitor.plot()
    summary = loop.monitor.summarise(step=loop.step)
    if summary.images_per_second == 0:
        logger.info("the run was already finished, at step %d", loop.step)
    else:
        logger.info(
            "done: %d steps at %.0f source images/s (%.0f views/s); %s",
            loop.step,
            summary.images_per_second,
            summary.images_per_second * len(experiment.recipe.views),
            summary.bottleneck,
        )
        bad = summary.bad_images
        if bad:
            logger.warning("%d images could not be decoded and were replaced, e.g. %s", len(bad), next(iter(bad)))
        logger.info("backbone: %s; report: %s", folder.backbone, folder.report)
    if experiment.world.is_rank0:
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
    )
