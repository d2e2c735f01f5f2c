"""Collects metrics every `log_every` steps, checks that they are finite, and sends them to the loggers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console

from mvssl.config.serialize import to_dict
from mvssl.evaluate.online_knn import OnlineAccuracy
from mvssl.monitor.bottleneck import describe_bottleneck
from mvssl.monitor.collapse import CollapseWatch, effective_rank, embedding_std, find_collapse
from mvssl.monitor.console import Status, TrainingProgress
from mvssl.monitor.cpu_use import CpuMeter
from mvssl.monitor.idle_sampler import IdleSampler
from mvssl.monitor.loggers import MetricLoggers
from mvssl.monitor.pictures import plot_losses
from mvssl.runs.checked_json import write_json
from mvssl.runs.environment import peak_memory_gib, return_free_memory
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import JsonLines, complete_bytes, read_metrics, values_of
from mvssl.runs.summary import Summary, write_summary
from mvssl.training.experiment import Experiment, Position
from mvssl.training.metric_buffer import MetricBuffer
from mvssl.training.pace import Pace, Speed
from mvssl.training.step import StepOutput
from pipelines.names import Url
from pipelines.runtime import InputError
from pipelines.views.spec import tasks

_PATIENCE = 500  # steps of collapse before a run stops, if an epoch is shorter
_SMALLEST_SCALE = 2.0**-10  # the fp16 loss scale starts at 2**16 and halves at every overflow

logger = logging.getLogger("mvssl")


class Diverged(InputError):
    """The loss, gradient or weights became NaN or infinite; earlier checkpoints are untouched."""

    stopped_by = "divergence"


class Monitor:
    """Metrics, throughput and display of a run. A context manager.

    Every rank has one and calls it at the same points; only rank 0 writes and prints.

    Attributes:
        buffer: metrics of the steps since the last log point.
        collapse: whether the embeddings stay collapsed, as rank 0 sees them.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, console: Console, position: Position) -> None:
        self.buffer = MetricBuffer()
        if position.buffer is not None:
            self.buffer.load_state_dict(position.buffer, experiment.device)
        self._experiment = experiment
        self._folder = folder
        self._first_step = position.step
        self._loggers = _Loggers(experiment, folder, console, position) if experiment.world.is_rank0 else None
        self.collapse = _collapse_watch(experiment)
        if experiment.world.is_rank0:
            self._replay(folder)
        self._pace = Pace(step=position.step, batch_size=experiment.recipe.batch_size)
        self._cores = CpuMeter(processes=experiment.world.local_size)
        self._in_the_way = ""  # of the cores, at the last log point
        self._idle_sampler = IdleSampler(experiment.device, hold=lambda: experiment.step.capturing)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._idle_sampler.close()
        if self._loggers is not None:
            self._loggers.close()

    @property
    def latest(self) -> dict[str, float]:
        """The last value of every logged metric on rank 0, by its name in `TrainResult.curves`."""
        return {} if self._loggers is None else dict(self._loggers.metrics.latest)

    def step(self) -> AbstractContextManager[None]:
        """Context of a training step, entered with its batch received."""
        return self._idle_sampler.step()

    def tick(self, output: StepOutput, *, step: int) -> None:
        """Show a step between two log points, without a host sync: the losses only if they are computed on the CPU."""
        if self._loggers is None:
            return
        experiment, display = self._experiment, self._loggers.display
        waited, first = experiment.loader.stats.wait_seconds, not self._pace.started
        self._pace.stepped(step, waited)
        display.move(step)
        if not display.due():
            return
        losses = {}
        if experiment.device.type == "cpu" and experiment.world.size == 1:
            losses = dict(zip(tasks(experiment.recipe.views), output.losses.tolist(), strict=True))
        status = self._status(step, losses, output, self._pace.recent(step, waited))
        if first:
            status = replace(status, first_seconds=self._pace.seconds)
        display.show(status)
        if first or not display.live:  # a panel is redrawn too often for a log
            logger.debug(status.line())

    def log_train(self, output: StepOutput, *, step: int) -> None:
        """Check and log the steps since the last log point, of which `output` is the last one's.

        Losses are of the whole batch, embeddings are rank 0's.
        """
        self.check_finite(step)
        experiment = self._experiment
        pace = self._pace.log_point(step, experiment.world.max(experiment.loader.stats.wait_seconds))
        if self._loggers is None:
            self.buffer.clear()
            return
        metrics = self.buffer.rows()  # [steps, 2 + T]
        _, loss, *task_losses = metrics.mean(dim=0).tolist()
        losses = dict(zip(tasks(self._experiment.recipe.views), task_losses, strict=True))
        embedding = output.embedding.float()  # [B, D]
        std, rank = embedding_std(embedding), effective_rank(embedding)
        grad_norm = float(metrics[-1, 0])
        row: dict[str, float | None] = {
            "loss": loss,
            **{f"loss/{task}": value for task, value in losses.items()},
            "lr": output.lr,
            "target_decay": output.tau,
            "embedding_std": float(std),
            "effective_rank": float(rank),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # fp16 gradients may overflow
        }
        epoch = (step - 1) // experiment.order.steps_per_epoch
        speed = {
            "seconds": pace.seconds,
            "images_per_second": pace.images_per_second,
            "views_per_second": pace.images_per_second * len(experiment.recipe.views),
            "data_wait": pace.data_wait,
            "memory_gib": peak_memory_gib(experiment.device),
        }
        cores = self._cores.recent()
        if cores is not None:
            speed |= {"cores": cores.own, "others_cores": cores.others, "throttled": cores.throttled}
        self._in_the_way = "" if cores is None else cores.describe()
        idle = self._idle_sampler.fractions()
        if idle is not None:
            speed |= {"device_idle": idle.total, "launching": idle.launching(speed["data_wait"])}
        status = self._status(step, losses, output, pace, device_idle=speed.get("device_idle"))
        self._loggers.metrics.write({"kind": "train", "step": step, "epoch": epoch, **row})
        self._loggers.throughput.write({"step": step, **speed})
        self._loggers.scalars.write(step, {f"train/{name}": value for name, value in row.items() if value is not None})
        self._loggers.scalars.write(step, {f"speed/{name}": value for name, value in speed.items()})
        self._loggers.display.show(status)
        logger.debug(status.line())
        collapse = find_collapse(std=float(std), rank=float(rank), batch_size=len(embedding), dim=embedding.shape[1])
        if self.collapse.see(step, collapse) and collapse is not None:  # once, not at every log point
            logger.warning("step %d: %s", step, collapse.warning())
        self.buffer.clear()

    def log_evaluation(self, accuracy: OnlineAccuracy, *, step: int, best: str) -> None:
        """Log an evaluation; the first k is the headline of kNN. `best` is said of it; "" for nothing."""
        if self._loggers is None:
            return
        epochs = step // self._experiment.order.steps_per_epoch
        knn = {"top1": next(iter(accuracy.knn.values())), **{f"top1_k{k}": x for k, x in accuracy.knn.items()}}
        rows = {"knn": knn} | ({} if accuracy.probe is None else {"probe": {"top1": accuracy.probe}})
        for kind, row in rows.items():
            self._loggers.metrics.write({"kind": kind, "step": step, "epoch": epochs - 1, **row})
            self._loggers.scalars.write(step, {f"{kind}/{name}": value for name, value in row.items()})
        said = ", ".join(f"top-1 {100 * value:.2f} % (k={k})" for k, value in accuracy.knn.items())
        if accuracy.probe is not None:
            said += f"; linear probe: top-1 {100 * accuracy.probe:.2f} %"
        logger.info("kNN after epoch %d: %s%s", epochs, said, f"; {best}" if best else "")

    def check_finite(self, step: int) -> None:
        """Average the buffer over the ranks and check it, so that all ranks reach one verdict. Waits for the device.

        Raises:
            Diverged: a loss or gradient is not finite; failure.json has the first such step, its losses and images. In
                fp16 single gradients may overflow, which the scaler handles; there, only if the scaler has given up.
        """
        experiment, scaler = self._experiment, self._experiment.step.scaler
        self.buffer.average(experiment.world)
        if scaler.is_enabled() and scaler.get_scale() < _SMALLEST_SCALE:
            raise Diverged(
                f"By step {step} nearly all fp16 gradients had overflowed (loss scale {scaler.get_scale():g}): "
                f"{_remedy(experiment)}."
            )
        failure = self.buffer.non_finite(last_step=step, gradients=not scaler.is_enabled())
        if failure is None:
            return
        index = [i for part in experiment.world.gather_objects(failure.index) for i in part]  # of the whole batch
        if experiment.world.is_rank0:
            write_json(
                self._folder.failure,
                {
                    "step": failure.step,
                    "epoch": (failure.step - 1) // experiment.order.steps_per_epoch,
                    "grad_norm": repr(failure.grad_norm),
                    "losses": [repr(loss) for loss in failure.losses],
                    "index": index,
                    "keys": [experiment.source.key(i) for i in index],
                    "recipe": to_dict(experiment.recipe),
                },
            )
        raise Diverged(
            f"The loss or gradient of step {failure.step} is not finite; {self._folder.failure} lists its images, and "
            f"earlier checkpoints are untouched: {_remedy(experiment)}."
        )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of an evaluation or a save from the training speed."""
        self._idle_sampler.interrupt()
        with self._pace.pause():
            yield

    def sync(self) -> int:
        """Wait until metrics and logs are on the disk; the size of metrics.jsonl (0 on ranks that do not write it)."""
        if self._loggers is None:
            return 0
        self._loggers.scalars.flush()
        self._folder.sync()
        return self._loggers.metrics.sync()

    def plot(self) -> None:
        """Redraw losses.png."""
        if self._loggers is not None:
            plot_losses(self._folder.metrics, self._folder.losses)
            return_free_memory()

    def summarise(self, *, step: int, stopped_by: str | None = None) -> Summary:
        """Summary of the run since its start or resumption. Rank 0 writes summary.json, unless no step was taken.

        The wait for the first batch is left out: nothing can be ready then.
        """
        experiment, stats = self._experiment, self._experiment.loader.stats
        seconds = self._pace.seconds
        images_per_second = (step - self._first_step) * experiment.recipe.batch_size / max(seconds, 1e-9)
        first = stats.first_wait_seconds
        waited = experiment.world.max(stats.wait_seconds - first)
        data_wait = min(waited / max(seconds - first, 1e-9), 1.0)
        summary = Summary(
            step=step,
            total_steps=experiment.total_steps,
            stopped_by=stopped_by,
            images_per_second=images_per_second,
            data_wait=data_wait,
            bottleneck=describe_bottleneck(
                data_wait,
                stats.stages,
                stats.prepared,
                device=experiment.device,
                images_per_second=images_per_second,
                idle=self._idle_sampler.run_fractions(),
                cpu=self._cores.total(),
                remote=isinstance(experiment.options.data, Url),
            ),
            bad_images=dict(stats.bad),
        )
        if experiment.world.is_rank0 and step > self._first_step:
            try:
                write_summary(self._folder.summary, summary)
            except (OSError, InputError) as error:  # everything that matters is saved
                logger.warning("%s could not be written: %s", self._folder.summary, error)
        return summary

    def _replay(self, folder: RunFolder) -> None:
        """Show the watch what earlier parts of the run logged, so that a resumed run stops where it would have."""
        recipe, best = self._experiment.recipe, -1.0
        images = recipe.batch_size // self._experiment.world.size
        for row in read_metrics(folder.metrics):
            std, rank = row.get("embedding_std"), row.get("effective_rank")
            if row["kind"] == "train" and isinstance(std, float) and isinstance(rank, float):
                collapse = find_collapse(std=std, rank=rank, batch_size=images, dim=recipe.projector.out)
                self.collapse.see(row["step"], collapse)
            elif row["kind"] == "knn" and row["top1"] > best:
                best = row["top1"]
                self.collapse.improved(row["step"])

    def _status(
        self,
        step: int,
        losses: dict[str, float],
        output: StepOutput,
        speed: Speed,
        *,
        device_idle: float | None = None,
    ) -> Status:
        """A step as the display shows it."""
        experiment = self._experiment
        return Status(
            step=step,
            steps=experiment.total_steps,
            epoch=(step - 1) // experiment.order.steps_per_epoch + 1,
            epochs=experiment.recipe.epochs,
            losses=losses,
            learning_rate=output.lr,
            tau=output.tau,
            images_per_second=speed.images_per_second,
            views_per_image=len(experiment.recipe.views),
            data_wait=speed.data_wait,
            device_idle=device_idle,
            cores=self._in_the_way,
            memory_gib=peak_memory_gib(experiment.device),
            seconds_left=self._pace.seconds_left(step, experiment.total_steps),
        )


def check_weights(experiment: Experiment, step: int) -> None:
    """Raise `Diverged` if a weight of the online network is not finite. Waits for the device."""
    norms = torch.stack(torch._foreach_norm([p.detach() for p in experiment.step.online.parameters()]))
    if not bool(norms.isfinite().all()):
        raise Diverged(
            f"The weights after step {step} are not finite, so they are not saved; earlier checkpoints are untouched: "
            f"{_remedy(experiment)}."
        )


def _remedy(experiment: Experiment) -> str:
    """What to do about a run that diverged; a resumed run may have another precision but no other learning rate."""
    lower = "start again with a lower --optimizer.base-lr"
    if experiment.computed.precision == "fp32":
        return lower
    return f"{lower}, or continue with --resume and --precision fp32"


def _collapse_watch(experiment: Experiment) -> CollapseWatch:
    """A watch with the patience of the options; by default an epoch, and 500 steps if that is more."""
    epoch = experiment.order.steps_per_epoch
    patience = experiment.options.collapse_patience or max(_PATIENCE, epoch)
    return CollapseWatch(patience=patience, warmup=round(experiment.recipe.optimizer.warmup_epochs * epoch))


class _MetricLines(JsonLines):
    """metrics.jsonl; knows the last value of every metric."""

    def __init__(self, path: Path, *, keep_bytes: int) -> None:
        super().__init__(path, keep_bytes=keep_bytes)
        self.latest: dict[str, float] = {}

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        super().write(row)
        self.latest.update(values_of(row))


class _Loggers:
    """Open outputs of a run: metrics.jsonl (cut back to `position`), throughput.jsonl, metric loggers, display."""

    def __init__(self, experiment: Experiment, folder: RunFolder, console: Console, position: Position) -> None:
        self.metrics = _MetricLines(folder.metrics, keep_bytes=position.metrics_bytes)
        size = complete_bytes(folder.throughput) if position.step else 0
        self.throughput = JsonLines(folder.throughput, keep_bytes=size)
        self.scalars = MetricLoggers(folder, experiment.options, first_step=position.step)
        starting = "compiling" if experiment.step.compiled else "starting"
        self.display = TrainingProgress(console, steps=experiment.total_steps, done=position.step, starting=starting)

    def close(self) -> None:
        """Close all."""
        self.display.close()
        self.metrics.close()
        self.throughput.close()
        self.scalars.close()
