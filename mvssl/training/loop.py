"""The training loop: for each batch, step, log, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

from mvssl.evaluate.online_knn import OnlineAccuracy, evaluate_online
from mvssl.evaluate.session import Session
from mvssl.monitor.collapse import Collapsed
from mvssl.ranks import OtherRankFailed
from mvssl.runs.checkpoint import link_best
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import accuracies, last_knn
from mvssl.training.callbacks import Callbacks, Hook
from mvssl.training.experiment import Experiment, Position
from mvssl.training.monitor import Monitor, check_weights
from mvssl.training.shutdown import CALLBACK, COLLAPSE, Interrupted, StopRequest


class Loop:
    """Trains from a position to the end of the run.

    Attributes:
        step: optimiser steps done.
        evaluated: False if the evaluation due after this step is still to be done.
        knn: kNN top-1 accuracy in [0, 1] by k, of the last evaluation; empty before the first one.
        probe: top-1 accuracy in [0, 1] of the linear probe, of the last evaluation; None without one.
        best: step of the checkpoint that is kept as the best one; None without one.
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
        self._new_best = False
        self._accuracies: dict[str, dict[int, float]]  # by kind and step
        self.knn, self._accuracies, self.best = experiment.world.run_on_rank0(self._earlier)
        self.probe = next(reversed(self._accuracies["probe"].values()), None)

    def run(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: a stop was requested; everything is saved.
            Diverged: the loss became NaN or infinite.
            CallbackFailed: a callback raised; everything is saved.
            Collapsed: the embeddings stayed collapsed; everything is saved.
        """
        experiment, world, total = self.experiment, self.experiment.world, self.experiment.total_steps
        steps_per_epoch = experiment.order.steps_per_epoch
        if not self.evaluated:  # the run was stopped during the evaluation
            self.evaluated = not experiment.evaluates
            if experiment.evaluates:  # unless the recipe has no evaluations by now
                self.evaluate()
            self.save()
        self._check_collapse()
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
                self._check_collapse()
                stopped_by = self._agree()
                if stopped_by or self.save_due(epoch + 1, epoch_ends):
                    self.save()
                    self.callbacks.saved(step=self.step)
                    stopped_by = stopped_by or self._agree()
        world.run_on_rank0(self.callbacks.check)
        if stopped_by == COLLAPSE:
            raise Collapsed(self._describe_collapse())
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
        """Measure and log kNN accuracy and linear probe. A stop request ends this early; the resumed run repeats it.

        Other errors (out of memory, a damaged file) propagate. A run of one process saves first, so that the epoch is
        not lost.
        """
        experiment = self.experiment
        self.evaluated = False
        with self.monitor.pause():
            try:
                accuracy = evaluate_online(
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
            self._note(accuracy)

    def save_due(self, epochs: int, epoch_ends: bool) -> bool:
        """Whether to save after this step, which is in epoch number `epochs` (from 1)."""
        options = self.experiment.options
        by_epoch = epoch_ends and options.save_every_epochs > 0 and epochs % options.save_every_epochs == 0
        by_step = options.save_every_steps is not None and self.step % options.save_every_steps == 0
        return by_epoch or by_step or self._new_best or self.step == self.experiment.total_steps

    def save(self) -> None:
        """Write a checkpoint, the exported backbone and losses.png."""
        began = time.monotonic()
        with self.monitor.pause():
            self.monitor.check_finite(self.step)
            check_weights(self.experiment, self.step)
            self.best = self.experiment.world.run_on_rank0(self._write)
        self._new_best = False
        self.stop.reserve = max(self.stop.reserve, 2 * (time.monotonic() - began))  # twice: disk speed varies

    def _write(self) -> int | None:
        """Write the files of a save; the step of the best checkpoint."""
        position = Position(
            step=self.step,
            metrics_bytes=self.monitor.sync(),
            evaluated=self.evaluated,
            buffer=self.monitor.buffer.state_dict(),
        )
        best = self.experiment.save(self.folder, position, best=self._best_first())
        self.monitor.plot()
        return best

    def _earlier(self) -> tuple[dict[int, float], dict[str, dict[int, float]], int | None]:
        """Accuracies of earlier parts of the run, and its best checkpoint, linked again after a kill."""
        metrics = self.folder.metrics
        self._accuracies = accuracies(metrics)
        return last_knn(metrics), self._accuracies, link_best(self.folder.checkpoints, self._best_first())

    def _best_first(self) -> list[int]:
        """Steps of the evaluations, by the accuracy that `keep_best` names; of equal ones the first is better."""
        found = self._accuracies.get(self.experiment.options.keep_best, {})
        return sorted(found, key=lambda step: (-found[step], step))

    def _note(self, accuracy: OnlineAccuracy) -> None:
        """Log an evaluation, and whether it is the best one; on all ranks what rank 0 has measured."""
        accuracy = self.experiment.world.run_on_rank0(lambda: accuracy)
        self.knn, self.probe = accuracy.knn, accuracy.probe
        headlines = {"knn": next(iter(accuracy.knn.values())), "probe": accuracy.probe}
        for kind, value in headlines.items():
            if value is not None:
                best = value > max(self._accuracies[kind].values(), default=-1.0)
                if best and kind == "knn":
                    self.monitor.collapse.improved(self.step)
                self._accuracies[kind][self.step] = value
        self._new_best = self._best_first()[:1] == [self.step]
        measure = {"knn": "kNN", "probe": "linear probe"}.get(self.experiment.options.keep_best, "")
        said = f"the best {measure} so far, kept as checkpoints/best" if self._new_best else ""
        self.monitor.log_evaluation(accuracy, step=self.step, best=said)

    def _check_collapse(self) -> None:
        """Request a stop if the embeddings stay collapsed, as rank 0 sees them. Not at the last step: all is done."""
        stops = self.experiment.options.on_collapse == "stop" and self.step < self.experiment.total_steps
        if stops and self.monitor.collapse.lasting is not None:
            self.stop.requested = self.stop.requested or COLLAPSE

    def _describe_collapse(self) -> str:
        """The sentence for the user; rank 0 alone knows what it saw."""
        watch = self.monitor.collapse
        if watch.lasting is None:
            return "The embeddings have collapsed, says rank 0: see there."
        return (
            f"The embeddings have collapsed: their {watch.lasting.measure} is {watch.lasting.value} but must be at "
            f"least {watch.lasting.least:g}, and has not been at any log point since step {watch.since}, so "
            f"{watch.lasting.meaning}: start again with a lower --optimizer.base-lr or a longer "
            f"--optimizer.warmup-epochs; everything is saved in {self.folder.path}, and --resume --on-collapse warn "
            f"trains on from step {self.step} of {self.experiment.total_steps}."
        )
