"""The training loop."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from mvssl.distributed import FailedElsewhere, World, join_world, process_local_rank
from mvssl.evaluate.neighbours.online import evaluate_knn
from mvssl.experiment import Experiment, open_experiment
from mvssl.monitor.failure import check_finite, check_weights
from mvssl.monitor.limits import what_limits
from mvssl.monitor.log import run_log
from mvssl.monitor.monitor import Monitor
from mvssl.monitor.pages.report import write_report
from mvssl.monitor.pages.sheet import write_view_sheet
from mvssl.monitor.places.jsonl import last_knn, read_jsonl
from mvssl.monitor.window import Window
from mvssl.optim.schedule import learning_rate
from mvssl.recipe import Recipe
from mvssl.runs.folder import RunFolder
from mvssl.runs.options import RunOptions, resolve_device
from mvssl.runs.state import Position, restore_state, save_state
from mvssl.runs.time_limit import parse_time
from mvssl.training.signals import StopRequest
from mvssl.trying.memory import explain_out_of_memory
from mvssl.weights.init_from import init_from
from pipelines.errors import InputError

logger = logging.getLogger("mvssl")


class Interrupted(Exception):
    """The run was asked to stop; its state is saved and `--resume` goes on.

    Attributes:
        stopped_by: name of the signal, or what else asked for it.
    """

    def __init__(self, message: str, stopped_by: str) -> None:
        super().__init__(message)
        self.stopped_by = stopped_by


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        out: the run folder.
        steps: optimiser steps of the whole run.
        knn: last kNN top-1 accuracy in [0, 1] for each k; empty where there are no labels.
        images_per_second: source images per second of training, evaluations and saves left out.
        data_wait: share of the training time the step waited for a batch, without the wait for the first one.
    """

    out: Path
    steps: int
    knn: dict[int, float]
    images_per_second: float
    data_wait: float

    def curves(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Steps [N] and values [N] of every number that was logged, by name: loss, loss/global, lr, knn/top1, ..."""
        kept: dict[str, list[tuple[int, float]]] = {}
        for row in read_jsonl(RunFolder(self.out).metrics):
            before = "" if row["kind"] == "train" else f"{row['kind']}/"
            for name, value in row.items():
                if name not in ("kind", "step", "epoch") and value is not None:
                    kept.setdefault(before + name, []).append((row["step"], value))
        return {
            name: (np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=np.float64))
            for name, pairs in kept.items()
        }


def train(recipe: Recipe, *, data: str | Path, out: str | Path, **options: Any) -> TrainResult:
    """Pre-train a backbone: `RunOptions` says what else can be given.

    In a script that torchrun starts, every process calls this; together they are one run.

    Raises:
        InputError: something given cannot be used.
        Interrupted: SIGINT or SIGTERM came; everything is saved.
        Diverged: the loss became NaN or infinite.
        FailedElsewhere: another rank failed, and says why, or is gone.
    """
    return run(recipe, RunOptions(data=Path(data), out=Path(out), **options))


def run(recipe: Recipe, options: RunOptions, *, console: Console | None = None) -> TrainResult:
    """Train as `recipe` and `options` say; see `train`."""
    if options.out is None:
        raise InputError("out is missing: name the run folder with --out PATH.")
    began, folder = time.monotonic(), RunFolder(options.out)
    device = resolve_device(options.device, local_rank=process_local_rank())
    with join_world(cuda=device.type == "cuda") as world:
        console = (console or Console()) if world.is_main else Console(quiet=True)
        world.on_main(lambda: _check_folder(folder, recipe, options))
        with ExitStack() as claim, open_experiment(recipe, options, console, world) as experiment:
            window = Window()
            claimed = world.on_main(lambda: _claim(folder, claim))  # before anything of an earlier run is touched
            position, earlier = _begin(experiment, folder, window)
            if not claimed:
                world.on_main(lambda: _claim(folder, claim))
            seconds = None if options.time is None else parse_time(options.time) - (time.monotonic() - began)
            with run_log(folder.log, console, rank=world.rank), StopRequest(world, seconds=seconds) as stop:
                _announce(experiment, folder, position.step)
                if earlier is not None:
                    logger.info("%s", _extended(experiment, position.step, earlier))
                if position.step == 0:
                    world.on_main(lambda: write_view_sheet(experiment, folder.views))
                with explain_out_of_memory(), Monitor(experiment, folder, console, position) as monitor:
                    return _Loop(experiment, folder, window, position, monitor, stop).run()


def _check_folder(folder: RunFolder, recipe: Recipe, options: RunOptions) -> None:
    """Check that the run may go on or begin in this folder, before any work is done for it."""
    if options.resume:
        folder.check_same_recipe(recipe, extend=options.extend)
    else:
        folder.check_free(overwrite=options.overwrite)


def _claim(folder: RunFolder, claim: ExitStack) -> bool:
    """Keep other processes out of the run folder, if it is there already."""
    if not folder.path.is_dir():
        return False
    claim.enter_context(folder.claimed())
    return True


def _begin(experiment: Experiment, folder: RunFolder, window: Window) -> tuple[Position, int | None]:
    """Restore the run in the folder, or make the folder for a new one.

    Returns where the run stands, and for how many epochs it was begun if it is extended now.
    """
    recipe, options, world = experiment.recipe, experiment.options, experiment.world
    earlier = world.on_main(lambda: folder.extend(recipe)) if options.resume else None
    if options.resume and world.on_main(folder.has_checkpoint):
        return restore_state(experiment, folder, window), earlier
    # A run that was stopped before its first checkpoint is resumed at its beginning.
    weights = world.on_main(lambda: folder.option("init_from")) if options.resume else options.init_from
    init_from(experiment.step, recipe, weights)
    if not options.resume:
        world.on_main(lambda: folder.begin(recipe, _plain(options), overwrite=options.overwrite))
    return Position(), earlier


def _extended(experiment: Experiment, step: int, earlier: int) -> str:
    """What a run that goes on for more epochs does with its learning rate, in a sentence."""
    config, per_epoch = experiment.recipe.optimizer, experiment.order.steps_per_epoch
    peak, warmup = config.base_lr * experiment.recipe.batch_size / 256, config.warmup_epochs * per_epoch
    was, now = (
        learning_rate(step, epochs * per_epoch, warmup, peak, config.final_lr_factor)
        for epochs in (earlier, experiment.recipe.epochs)
    )
    return (
        f"extended from {earlier} to {experiment.recipe.epochs} epochs: the learning rate goes on at {now:.3g}, where "
        f"it had come down to {was:.3g}, and falls along the longer cosine from there"
    )


class _Loop:
    """Every batch once through the step; log points, evaluations and saves where they are due."""

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        window: Window,
        position: Position,
        monitor: Monitor,
        stop: StopRequest,
    ) -> None:
        self.experiment = experiment
        self.world: World = experiment.world
        self.folder = folder
        self.window = window
        self.monitor = monitor
        self.stop = stop
        self.step = position.step
        self.evaluated = position.evaluated
        self.knn = self.world.on_main(lambda: last_knn(folder.metrics))

    def run(self) -> TrainResult:
        """Train to the end.

        Raises:
            Interrupted: a signal came; everything is saved.
            Diverged: the loss became NaN or infinite.
        """
        experiment, order, total = self.experiment, self.experiment.order, self.experiment.total_steps
        if not self.evaluated:  # a signal came in the middle of the evaluation
            self.evaluate()
            self.save()
        stopping = self.stop.agree()
        while self.step < total and not stopping:
            epoch, first_step = divmod(self.step, order.steps_per_epoch)
            batches = experiment.loader.epoch(epoch, first_step=first_step, until=experiment.recipe.epochs)
            while (batch := self.world.together(partial(next, batches, None))) is not None:
                index = batch.index
                with self.monitor.step():
                    output = experiment.step(batch.views, self.step)
                del batch  # or its views would stay in memory while the next ones are awaited
                self.step += 1
                self.window.add(output, index)
                epoch_ends = self.step % order.steps_per_epoch == 0
                if epoch_ends or self.step % experiment.options.log_every == 0:
                    self.window.average(self.world)
                    check_finite(experiment, self.folder, self.window, self.step)
                    self.monitor.log_train(self.window, output, step=self.step)
                if epoch_ends and self.evaluation_due(epoch + 1):
                    self.evaluate()
                stopping = self.stop.agree()
                if stopping or self.save_due(epoch + 1, epoch_ends):
                    self.save()
                if stopping:
                    break
        if stopping and not (self.step == total and self.evaluated):
            raise Interrupted(
                f"{stopping} came after step {self.step} of {total}; everything is saved in "
                f"{self.folder.path}: go on with --resume.",
                stopping,
            )
        return self.conclude()

    def save_due(self, epochs: int, epoch_ends: bool) -> bool:
        """Whether a checkpoint is due after this step, the last one of epoch number `epochs` if `epoch_ends`."""
        options = self.experiment.options
        by_epoch = epoch_ends and options.save_every_epochs > 0 and epochs % options.save_every_epochs == 0
        by_step = options.save_every_steps is not None and self.step % options.save_every_steps == 0
        return by_epoch or by_step or self.step == self.experiment.total_steps

    def save(self) -> None:
        """Write a checkpoint, the exported backbone and the loss picture."""
        began = time.monotonic()
        with self.monitor.pause():
            self.window.average(self.world)
            check_finite(self.experiment, self.folder, self.window, self.step)
            check_weights(self.experiment, self.step)
            self.world.on_main(self._write)
        self.stop.reserve = max(self.stop.reserve, 2 * (time.monotonic() - began))  # disks have their moods

    def _write(self) -> None:
        position = Position(step=self.step, metrics_bytes=self.monitor.sync(), evaluated=self.evaluated)
        save_state(self.experiment, self.folder, self.window, position)
        self.monitor.plot()

    def evaluation_due(self, epochs: int) -> bool:
        """Whether kNN is due after `epochs` epochs: every n epochs and at the end, where there are labels."""
        recipe = self.experiment.recipe
        return self.experiment.evaluates and (epochs == recipe.epochs or epochs % recipe.evaluation.every_epochs == 0)

    def evaluate(self) -> None:
        """Measure and report the backbone's kNN accuracy; a signal ends that early and leaves it for the resumption.

        Whatever else goes wrong (memory, a damaged file) is raised, in a run of one process after a save: the epoch is
        not lost.
        """
        experiment = self.experiment
        with self.monitor.pause():
            try:
                self.knn = evaluate_knn(
                    experiment.step.online.backbone,
                    experiment.source,
                    experiment.val,
                    experiment.recipe.evaluation,
                    device=experiment.device,
                    autocast=experiment.step.autocast_dtype,
                    decode=experiment.options.decode,
                    progress=self.stop.check,
                    world=self.world,
                )
            except (StopRequest.Requested, FailedElsewhere):  # a rank that failed for another reason ends the run
                self.evaluated = False
            except Exception:
                self.evaluated = False
                if self.world.size == 1:
                    self.save()
                raise
            else:
                self.evaluated = True
                self.monitor.log_knn(self.knn, step=self.step)

    def conclude(self) -> TrainResult:
        """Say in a few lines what came out, and leave the page about the run."""
        result = self._say_what_came_out()
        if self.world.is_main:
            try:
                write_report(self.folder.report, self.folder)
            except (OSError, InputError) as error:  # all that matters is saved
                logger.warning("%s could not be written: %s", self.folder.report, error)
        return result

    def _say_what_came_out(self) -> TrainResult:
        self.monitor.plot()
        speed, views = self.monitor.summary(step=self.step), len(self.experiment.recipe.views)
        result = TrainResult(
            out=self.folder.path,
            steps=self.step,
            knn=self.knn,
            images_per_second=speed["images_per_second"],
            data_wait=speed["data_wait"],
        )
        if speed["images_per_second"] == 0:
            logger.info("the run was finished already, at step %d", result.steps)
            return result
        stats = self.experiment.loader.stats
        logger.info(
            "done: %d steps at %.0f source images/s (%.0f views/s); %s",
            result.steps,
            result.images_per_second,
            result.images_per_second * views,
            what_limits(
                result.data_wait,
                stats.stages,
                stats.prepared,
                device=self.experiment.device,
                pace=result.images_per_second,
                shares=self.monitor.device_shares(),
            ),
        )
        bad = stats.bad
        if bad:
            logger.warning("%d images could not be decoded and were replaced, e.g. %s", len(bad), next(iter(bad)))
        logger.info("backbone: %s; all about this run: %s", self.folder.backbone, self.folder.report)
        return result


def _plain(options: RunOptions) -> dict[str, Any]:
    """Options as JSON values; paths are made absolute, so that they hold from any folder."""
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in asdict(options).items()}


def _announce(experiment: Experiment, folder: RunFolder, step: int) -> None:
    """Say in a few lines what is about to run."""
    recipe, order, ranks = experiment.recipe, experiment.order, experiment.world.size
    shared = f" ({recipe.batch_size // ranks} on each of {ranks} processes)" if ranks > 1 else ""
    logger.info(
        "%s %s: %s, %s images, %d views an image, batch %d%s, %d epochs of %d steps, on %s with %s",
        "Resuming" if step else "Training",
        recipe.name,
        recipe.backbone.name,
        f"{len(experiment.source):,}",
        len(recipe.views),
        recipe.batch_size,
        shared,
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
        images = recipe.batch_size // ranks // recipe.accumulate
        logger.info(
            "a step takes its images in %d parts of %d, with one update for all: the numbers of %d processes, each "
            "with a part (BatchNorm over %d images at a time)",
            recipe.accumulate,
            images,
            ranks * recipe.accumulate,
            images,
        )
    if recipe.step_mode == "joint" and experiment.step.view_by_view is not None:
        logger.info(
            "views pass one by one, which is slower than those of one size together: %s takes statistics of its batch "
            "in a way of its own",
            experiment.step.view_by_view,
        )
    if recipe.evaluation.every_epochs and not experiment.evaluates:
        logger.info("no kNN: the images have no labels; collapse is still watched by embedding spread and rank")
    logger.info("run folder: %s", folder.path)
