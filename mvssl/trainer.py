"""The training loop."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mvssl import checkpoint
from mvssl.evaluate.online import evaluate_knn
from mvssl.experiment import Experiment, open_experiment
from mvssl.export import export_backbone
from mvssl.init_from import init_from
from mvssl.monitor.log import run_log
from mvssl.monitor.monitor import Monitor
from mvssl.monitor.sheet import write_view_sheet
from mvssl.monitor.window import Window
from mvssl.options import RunOptions
from mvssl.recipe import Recipe
from mvssl.run_folder import RunFolder, write_json
from mvssl.serialize import to_dict
from mvssl.signals import StopRequest
from pipelines.errors import InputError

logger = logging.getLogger("mvssl")


class Interrupted(Exception):
    """The run was asked to stop; its state is saved and `--resume` goes on."""


class Diverged(InputError):
    """The loss became NaN or infinite; what led there is in failure.json, the last good checkpoint is untouched."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        out: the run folder.
        steps: optimiser steps of the whole run.
        knn: last kNN top-1 accuracy in [0, 1] for each k; empty where there are no labels.
        images_per_second: source images per second of training, evaluations and saves left out.
        data_wait: share of the training time the step waited for a batch.
    """

    out: Path
    steps: int
    knn: dict[int, float]
    images_per_second: float
    data_wait: float


def train(recipe: Recipe, *, data: str | Path, out: str | Path, **options: Any) -> TrainResult:
    """Pre-train a backbone: `RunOptions` says what else can be given.

    Raises:
        InputError: something given cannot be used.
        Interrupted: SIGINT or SIGTERM came; everything is saved.
        Diverged: the loss became NaN or infinite.
    """
    return run(recipe, RunOptions(data=Path(data), out=Path(out), **options))


def run(recipe: Recipe, options: RunOptions, *, console: Console | None = None) -> TrainResult:
    """Train as `recipe` and `options` say; see `train`."""
    if options.out is None:
        raise InputError("out is missing: name the run folder with --out PATH.")
    console = console or Console()
    folder = RunFolder(options.out)
    if options.resume:
        folder.check_same_recipe(recipe)
    with open_experiment(recipe, options) as experiment:
        saved = checkpoint.load(folder.last) if options.resume else None
        if saved is None:
            init_from(experiment.step, recipe, options.init_from)
            folder.begin(recipe, _plain(options), overwrite=options.overwrite)
        with run_log(folder.log, console):
            return _train(experiment, folder, saved, console)


def _train(
    experiment: Experiment, folder: RunFolder, saved: checkpoint.Checkpoint | None, console: Console
) -> TrainResult:
    """The loop: every batch once through the step, a log point now and then, saves where they are due."""
    options, order, total = experiment.options, experiment.order, experiment.total_steps
    window, knn = Window(), dict[int, float]()
    step, metrics_bytes = _restore(experiment, window, saved) if saved else (0, 0)
    _announce(experiment, folder, step)
    if saved is None:
        write_view_sheet(experiment, folder.views)
    with StopRequest() as stop, Monitor(experiment, folder, console, step=step, metrics_bytes=metrics_bytes) as monitor:

        def save() -> None:
            began = time.perf_counter()
            _check_finite(experiment, folder, window, step)
            _save(experiment, folder, window, step, monitor.sync())
            monitor.plot()
            monitor.resume_clock(began)

        while step < total:
            epoch, first_step = divmod(step, order.steps_per_epoch)
            for batch in experiment.loader.epoch(
                epoch, first_step=first_step, read_ahead=epoch + 1 < experiment.recipe.epochs
            ):
                output = experiment.step(batch.views, step)
                step += 1
                window.add(output.loss, output.losses, batch.index)
                epoch_ends = step % order.steps_per_epoch == 0
                if step % options.log_every == 0 or epoch_ends:
                    _check_finite(experiment, folder, window, step)
                    monitor.log_train(window, output, step=step)
                if epoch_ends and _evaluation_due(experiment, epoch + 1):
                    began = time.perf_counter()
                    knn = _evaluate(experiment)
                    monitor.log_knn(knn, step=step)
                    monitor.resume_clock(began)
                if stop.requested or step == total or _save_due(options, step, epoch + 1, epoch_ends):
                    save()
                if stop.requested and step < total:
                    raise Interrupted(
                        f"{stop.requested} came after step {step} of {total}; everything is saved in {folder.path}: "
                        "go on with --resume."
                    )
        speed = monitor.summary(step=step)
    result = TrainResult(
        out=folder.path,
        steps=total,
        knn=knn,
        images_per_second=speed["images_per_second"],
        data_wait=speed["data_wait"],
    )
    _conclude(experiment, result)
    return result


def _restore(experiment: Experiment, window: Window, saved: checkpoint.Checkpoint) -> tuple[int, int]:
    """Put everything back as it was when the checkpoint was made; the step it was made after and metrics' size."""
    if saved.meta["data"] != experiment.source.fingerprint:
        raise InputError(
            f"data is {str(experiment.options.data)!r} but the run was begun with other images (their names, sizes or "
            "labels differ): give the data set the run was begun with, or begin a new run."
        )
    experiment.step.load_state_dict(saved.state["step"])
    window.load_state_dict(saved.state["window"], experiment.device)
    checkpoint.restore_rng_state(saved.state["rng"])
    return int(saved.meta["step"]), int(saved.meta["metrics_bytes"])


def _save(experiment: Experiment, folder: RunFolder, window: Window, step: int, metrics_bytes: int) -> None:
    """Write the checkpoint of `step`, then the exported backbone."""
    checkpoint.save(
        folder.checkpoints,
        step=step,
        state={
            "step": experiment.step.state_dict(),
            "window": window.state_dict(),
            "rng": checkpoint.rng_state(),
        },
        meta={
            "recipe": to_dict(experiment.recipe),
            "data": experiment.source.fingerprint,
            "metrics_bytes": metrics_bytes,
        },
        keep=experiment.options.keep_checkpoints,
    )
    export_backbone(experiment.step.online.backbone, experiment.recipe.backbone.name, folder.backbone)


def _save_due(options: RunOptions, step: int, epochs: int, epoch_ends: bool) -> bool:
    """Whether a checkpoint is due after `step`, the last one of epoch number `epochs` if `epoch_ends`."""
    by_epoch = epoch_ends and options.save_every_epochs > 0 and epochs % options.save_every_epochs == 0
    by_step = options.save_every_steps is not None and step % options.save_every_steps == 0
    return by_epoch or by_step


def _evaluation_due(experiment: Experiment, epochs: int) -> bool:
    """Whether kNN is due after `epochs` epochs: every n epochs and at the end, where there are labels."""
    every = experiment.recipe.evaluation.every_epochs
    return experiment.evaluates and (epochs % every == 0 or epochs == experiment.recipe.epochs)


def _evaluate(experiment: Experiment) -> dict[int, float]:
    """kNN accuracy of the online backbone as it is now."""
    return evaluate_knn(
        experiment.step.online.backbone,
        experiment.source,
        experiment.val,
        experiment.recipe.evaluation,
        device=experiment.device,
        autocast=experiment.step.autocast_dtype,
        decoder=experiment.options.decoder,
        threads=experiment.options.threads,
    )


def _check_finite(experiment: Experiment, folder: RunFolder, window: Window, step: int) -> None:
    """Stop the run if a loss since the last log point is not finite, and leave what led there in failure.json."""
    failure = window.non_finite(last_step=step)
    if failure is None:
        return
    write_json(
        folder.failure,
        {
            "step": failure.step,
            "epoch": (failure.step - 1) // experiment.order.steps_per_epoch,
            "losses": [repr(loss) for loss in failure.losses],
            "index": failure.index,
            "keys": [experiment.source.key(i) for i in failure.index],
            "recipe": to_dict(experiment.recipe),
        },
    )
    raise Diverged(
        f"The loss of step {failure.step} is not finite; its images are listed in {folder.failure} and the last "
        "checkpoint is from before it: lower --optimizer.base-lr, or use --precision fp32 or bf16, "
        "and --resume or start anew."
    )


def _plain(options: RunOptions) -> dict[str, Any]:
    """Options as JSON values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}


def _announce(experiment: Experiment, folder: RunFolder, step: int) -> None:
    """Say in a few lines what is about to run."""
    recipe, order = experiment.recipe, experiment.order
    logger.info(
        "%s %s: %s, %s images, %d views an image, batch %d, %d epochs of %d steps, on %s with %s",
        "Resuming" if step else "Training",
        recipe.name,
        recipe.backbone.name,
        f"{len(experiment.source):,}",
        len(recipe.views),
        recipe.batch_size,
        recipe.epochs,
        order.steps_per_epoch,
        experiment.device,
        experiment.loader.decoder_name,
    )
    if step:
        logger.info("from step %d of %d", step, experiment.total_steps)
    if recipe.evaluation.every_epochs and not experiment.evaluates:
        logger.info("no kNN: the images have no labels; collapse is still watched by embedding spread and rank")
    logger.info("run folder: %s", folder.path)


def _conclude(experiment: Experiment, result: TrainResult) -> None:
    """Say in a few lines what came out."""
    wait = 100 * result.data_wait
    logger.info(
        "done: %d steps at %.0f source images/s (%.0f views/s); the step waited for data %.1f %% of the time",
        result.steps,
        result.images_per_second,
        result.images_per_second * len(experiment.recipe.views),
        wait,
    )
    bad = experiment.loader.stats.bad
    if bad:
        logger.warning("%d images could not be decoded and were replaced, e.g. %s", len(bad), next(iter(bad)))
    logger.info("backbone: %s", RunFolder(result.out).backbone)
