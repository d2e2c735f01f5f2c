"""The training loop.

What a run comes to: its result, or where it was stopped.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvssl.distributed import FailedElsewhere, World
from mvssl.evaluate.online_knn import evaluate_knn
from mvssl.monitor.bottleneck import what_limits
from mvssl.monitor.loggers import last_knn, read_jsonl
from mvssl.monitor.report import write_report
from mvssl.runs.folder import RunFolder
from mvssl.training.experiment import Experiment
from mvssl.training.metric_buffer import Window
from mvssl.training.monitor import Monitor, check_finite, check_weights
from mvssl.training.shutdown import StopRequest
from mvssl.training.state import Position, save_state
from pipelines.runtime import InputError


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


logger = logging.getLogger("mvssl")


class Loop:
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
