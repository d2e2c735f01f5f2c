"""The training loop: for each batch, step, log, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

from mvssl.evaluate.online_knn import evaluate_knn
from mvssl.evaluate.session import Session
from mvssl.ranks import OtherRankFailed
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import last_knn
from mvssl.training.callbacks import Callbacks, Hook
from mvssl.training.experiment import Experiment, Position
from mvssl.training.monitor import Monitor, check_weights
from mvssl.training.shutdown import CALLBACK, Interrupted, StopRequest


class Loop:
    """Trains from a position to the end of the run.

    Attributes:
        step: optimiser steps done.
        evaluated: False if the evaluation due after this step is still to be done.
        knn: kNN top-1 accuracy in [0, 1] by k, of the last evaluation; empty before the first one.
        stopped_by: name of the callback that ended the run before its last step; None if none did.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        position: Position,
        monitor: Monitor,
        stop: StopRequest,
        hooks: Mapping[str, tuple[Hook, ...]],
    ) -> None:
        self.experiment = experiment
        self.folder = folder
        self.monitor = monitor
        self.stop = stop
        self.callbacks = Callbacks(hooks, experiment, folder, monitor)
        self.stopped_by: str | None = None
        self.step = position.step
        self.evaluated = position.evaluated
        self.knn = experiment.world.run_on_rank0(lambda: last_knn(folder.metrics))

    def run(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: a stop was requested; everything is saved.
            Diverged: the loss became NaN or infinite.
            CallbackFailed: a callback raised; everything is saved.
        """
        experiment, world, total = self.experiment, self.experiment.world, self.experiment.total_steps
        steps_per_epoch = experiment.order.steps_per_epoch
        if not self.evaluated:  # the run was stopped during the evaluation
            self.evaluated = not experiment.evaluates
            if experiment.evaluates:  # unless the recipe has no evaluations by now
                self.evaluate()
            self.save()
        stopped_by = self.stop.agree()
        while self.step < total and not stopped_by:
            epoch, first_step = divmod(self.step, steps_per_epoch)
            batches = experiment.loader.epoch(epoch, first_step=first_step, until=experiment.recipe.epochs)
            while not stopped_by and (batch := world.run_on_all(partial(next, batches, None))) is not None:
                with self.monitor.step():
                    output = experiment.step(batch.views, self.step)
                self.monitor.buffer.add(output, batch.index)
                del batch  # frees its views before the next batch is awaited
                self.step += 1
                epoch_ends = self.step % steps_per_epoch == 0
                log_due = epoch_ends or self.step % experiment.options.log_every == 0
                if log_due:
                    self.monitor.log_train(output, step=self.step)
                else:
                    self.monitor.tick(output, step=self.step)
                self.callbacks.step_ended(output, step=self.step, logged=log_due)
                if epoch_ends:
                    if self.evaluation_due(epoch + 1):
                        self.evaluate()
                    self.callbacks.epoch_ended(output, step=self.step)
                stopped_by = self._agree()
                if stopped_by or self.save_due(epoch + 1, epoch_ends):
                    self.save()
                    self.callbacks.saved(step=self.step)
                    stopped_by = stopped_by or self._agree()
        world.run_on_rank0(self.callbacks.check)
        if stopped_by == CALLBACK:
            self.stopped_by = world.run_on_rank0(lambda: self.callbacks.stopped_by) if self.step < total else None
            return
        if stopped_by and not (self.step == total and self.evaluated):
            raise Interrupted(
                f"{stopped_by} came after step {self.step} of {total}; everything is saved in {self.folder.path}: "
                "continue with --resume.",
                stopped_by,
            )

    def _agree(self) -> str | None:
        """What any rank asks to stop by; None for nothing."""
        self.callbacks.request(self.stop)
        return self.stop.agree()

    def evaluation_due(self, epochs: int) -> bool:
        """Whether kNN is due after `epochs` epochs: every n epochs and at the end, if there are labels."""
        recipe = self.experiment.recipe
        return self.experiment.evaluates and (epochs == recipe.epochs or epochs % recipe.evaluation.every_epochs == 0)

    def evaluate(self) -> None:
        """Measure and log the backbone's kNN accuracy. A stop request ends this early; the resumed run repeats it.

        Other errors (out of memory, a damaged file) propagate. A run of one process saves first, so that the epoch is
        not lost.
        """
        experiment = self.experiment
        self.evaluated = False
        with self.monitor.pause():
            try:
                self.knn = evaluate_knn(
                    Session(
                        device=experiment.device,
                        autocast=experiment.step.autocast_dtype,
                        decode=experiment.options.decode,
                        world=experiment.world,
                    ),
                    experiment.step.online.backbone,
                    experiment.source,
                    experiment.val,
                    experiment.recipe.evaluation,
                    progress=self.stop.check,
                )
            except (StopRequest.Requested, OtherRankFailed):  # a rank that failed for another reason ends the run
                return
            except Exception:
                if experiment.world.size == 1:
                    self.save()
                raise
            self.evaluated = True
            self.monitor.log_knn(self.knn, step=self.step)

    def save_due(self, epochs: int, epoch_ends: bool) -> bool:
        """Whether to save after this step, which is in epoch number `epochs` (from 1)."""
        options = self.experiment.options
        by_epoch = epoch_ends and options.save_every_epochs > 0 and epochs % options.save_every_epochs == 0
        by_step = options.save_every_steps is not None and self.step % options.save_every_steps == 0
        return by_epoch or by_step or self.step == self.experiment.total_steps

    def save(self) -> None:
        """Write a checkpoint, the exported backbone and losses.png."""
        began = time.monotonic()
        with self.monitor.pause():
            self.monitor.check_finite(self.step)
            check_weights(self.experiment, self.step)
            self.experiment.world.run_on_rank0(self._write)
        self.stop.reserve = max(self.stop.reserve, 2 * (time.monotonic() - began))  # twice: disk speed varies

    def _write(self) -> None:
        position = Position(
            step=self.step,
            metrics_bytes=self.monitor.sync(),
            evaluated=self.evaluated,
            buffer=self.monitor.buffer.state_dict(),
        )
        self.experiment.save(self.folder, position)
        self.monitor.plot()
