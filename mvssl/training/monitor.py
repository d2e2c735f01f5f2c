"""Takes a run's numbers at its log points and puts them everywhere they are wanted.

Where the numbers of a run go: files of its folder and the display. Only rank 0 has them open.

Losses, gradients or weights that are not finite: stop, and leave what led there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from rich.console import Console

from mvssl.config.options import RunOptions
from mvssl.config.serialize import to_dict
from mvssl.monitor.console import Status, make_display
from mvssl.monitor.device_clock import DeviceClock, Shares
from mvssl.monitor.loggers import JsonLines, complete_bytes, make_scalar_writers
from mvssl.monitor.pictures import plot_losses
from mvssl.monitor.signals import collapse_warning, effective_rank, embedding_std
from mvssl.runs.environment import peak_memory_gib
from mvssl.runs.folder import RunFolder, write_json
from mvssl.training.experiment import Experiment
from mvssl.training.metric_buffer import Window
from mvssl.training.state import Position
from mvssl.training.step import StepOutput
from pipelines.runtime import InputError
from pipelines.views.spec import tasks


class Outputs:
    """Open outputs of a run.

    Attributes:
        metrics: metrics.jsonl, cut back to where the run goes on.
        throughput: throughput.jsonl.
        scalars: what else takes the numbers: TensorBoard, CSV tables, Weights & Biases.
        display: the console.
    """

    def __init__(
        self,
        folder: RunFolder,
        console: Console,
        *,
        first_step: int,
        total_steps: int,
        metrics_bytes: int,
        options: RunOptions,
    ) -> None:
        self._folder = folder
        self.metrics = JsonLines(folder.metrics, keep_bytes=metrics_bytes)
        size = complete_bytes(folder.throughput) if first_step else 0
        self.throughput = JsonLines(folder.throughput, keep_bytes=size)
        self.scalars = make_scalar_writers(folder, options, first_step=first_step)
        self.display = make_display(console, steps=total_steps, done=first_step)

    def plot(self) -> None:
        """Draw losses.png anew."""
        plot_losses(self._folder.metrics, self._folder.losses)

    def close(self) -> None:
        """Close all."""
        self.display.close()
        self.metrics.close()
        self.throughput.close()
        self.scalars.close()


_SMALLEST_SCALE = 2.0**-10  # the scaler begins at 2**16 and halves at every overflow


class Diverged(InputError):
    """The loss or gradient became NaN or infinite; earlier checkpoints are untouched."""


def check_finite(experiment: Experiment, folder: RunFolder, window: Window, step: int) -> None:
    """Check losses and gradients since the last log point, which the window has averaged over the ranks: all ranks come
    to the same verdict. Waits for the device.

    Raises:
        Diverged: one is not finite; failure.json names the first such step, its losses and its images. In fp16 single
            gradients may overflow, which the scaler deals with; there it is diverged when the scaler has given up.
    """
    scaler = experiment.step.scaler
    if scaler.is_enabled() and scaler.get_scale() < _SMALLEST_SCALE:
        raise Diverged(
            f"By step {step} nearly all fp16 gradients had overflowed (loss scale {scaler.get_scale():g}): use "
            "--precision bf16 or fp32, or lower --optimizer.base-lr, and start anew."
        )
    failure = window.non_finite(last_step=step, gradients=not scaler.is_enabled())
    if failure is None:
        return
    index = [i for share in experiment.world.gather_objects(failure.index) for i in share]  # of the whole batch
    if experiment.world.is_main:
        write_json(
            folder.failure,
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
        f"The loss or gradient of step {failure.step} is not finite; its images are listed in {folder.failure}, and "
        "checkpoints from before it are untouched: lower --optimizer.base-lr, or use --precision fp32, and start anew."
    )


def check_weights(experiment: Experiment, step: int) -> None:
    """Check that the online network may be saved. Waits for the device.

    Raises:
        Diverged: a parameter is not finite, though no loss has shown it yet.
    """
    norms = torch.stack(torch._foreach_norm([p.detach() for p in experiment.step.online.parameters()]))
    if not bool(norms.isfinite().all()):
        raise Diverged(
            f"Step {step} made weights that are not finite, so they are not saved; earlier checkpoints are untouched: "
            "lower --optimizer.base-lr, or use --precision fp32, and start anew."
        )


logger = logging.getLogger("mvssl")


@dataclass(kw_only=True)
class _Clock:
    """Wall time and waiting time, since the last log point and in all.

    Attributes:
        step: step of the last log point.
        began: when the run was begun or resumed.
        mark: when the last log point was.
        waited: the loader's waiting time then.
        paused: time spent on evaluations and saves so far.
        warm: step and time (pauses taken off) of the first log point: what follows is free of start-up and compiling.
    """

    step: int
    began: float = field(default_factory=time.perf_counter)
    mark: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    paused: float = 0.0
    warm: tuple[int, float] | None = None


class Monitor:
    """Metrics, throughput, TensorBoard, display and log of one run. A context manager.

    Every rank has one and calls it at the same moments; rank 0's alone reports.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, console: Console, position: Position) -> None:
        self._experiment = experiment
        self._first_step = step = position.step
        self._collapsed = False
        self._outputs: Outputs | None = None
        if experiment.world.is_main:
            self._outputs = Outputs(
                folder,
                console,
                first_step=step,
                total_steps=experiment.total_steps,
                metrics_bytes=position.metrics_bytes,
                options=experiment.options,
            )
        self._clock = _Clock(step=step)
        self._device_clock = DeviceClock(experiment.device, hold=lambda: experiment.step.capturing)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._device_clock.close()
        if self._outputs is not None:
            self._outputs.close()

    def step(self) -> AbstractContextManager[None]:
        """Enter around each training step, with its batch received."""
        return self._device_clock.step()

    def log_train(self, window: Window, output: StepOutput, *, step: int) -> None:
        """Report the steps of a window, of which `output` is the last one's, and begin a new window.

        Losses are of the whole batch (the window is averaged over the ranks), embeddings are rank 0's.
        """
        speed = self._speed(step)
        if self._outputs is None:
            window.clear()
            return
        rows = window.rows()  # [steps, 2 + T]
        _, loss, *task_losses = rows.mean(dim=0).tolist()
        losses = dict(zip(tasks(self._experiment.recipe.views), task_losses, strict=True))
        embedding = output.embedding.float()  # [B, D]
        std, rank = embedding_std(embedding), effective_rank(embedding)
        row: dict[str, float | None] = {
            "loss": loss,
            **{f"loss/{task}": value for task, value in losses.items()},
            "lr": output.lr,
            "target_decay": output.tau,
            "embedding_std": float(std),
            "effective_rank": float(rank),
            "grad_norm": float(rows[-1, 0]) if rows[-1, 0].isfinite() else None,  # fp16 gradients may overflow
        }
        epoch = (step - 1) // self._experiment.order.steps_per_epoch
        self._outputs.metrics.write({"kind": "train", "step": step, "epoch": epoch, **row})
        shares = self._device_clock.shares()
        if shares is not None:
            speed |= {"device_idle": shares.idle, "launching": shares.launching(speed["data_wait"])}
        self._outputs.throughput.write({"step": step, **speed})
        self._outputs.scalars.write(step, {f"train/{name}": value for name, value in row.items() if value is not None})
        self._outputs.scalars.write(step, {f"speed/{name}": value for name, value in speed.items()})
        status = self._status(step, epoch, losses, output, speed)
        self._outputs.display.show(status)
        logger.debug(status.line())
        warning = collapse_warning(std=float(std), rank=float(rank), batch_size=len(embedding), dim=embedding.shape[1])
        if warning is not None and not self._collapsed:  # once, not at every log point
            logger.warning("step %d: %s", step, warning)
        self._collapsed = warning is not None
        window.clear()

    def _speed(self, step: int) -> dict[str, float]:
        """What the machines did since the last log point; the data wait is the longest of any rank."""
        steps = step - self._clock.step
        now, waited = time.perf_counter(), self._waited()
        seconds = now - self._clock.mark
        images = steps * self._experiment.recipe.batch_size
        wait = (waited - self._clock.waited) / seconds
        self._clock.mark, self._clock.waited, self._clock.step = now, waited, step
        self._clock.warm = self._clock.warm or (step, now - self._clock.paused)
        return {
            "seconds": seconds,
            "images_per_second": images / seconds,
            "views_per_second": images * len(self._experiment.recipe.views) / seconds,
            "data_wait": min(wait, 1.0),
            "memory_gib": peak_memory_gib(self._experiment.device),
        }

    def _status(
        self, step: int, epoch: int, losses: dict[str, float], output: StepOutput, speed: dict[str, float]
    ) -> Status:
        """The log point as the display shows it."""
        total = self._experiment.total_steps
        now = time.perf_counter() - self._clock.paused
        begin, began = self._clock.warm or (self._first_step, self._clock.began)
        if step == begin:  # the first log point, start-up included; later ones leave it out
            begin, began = self._first_step, self._clock.began
        per_step = (now - began) / (step - begin)
        return Status(
            step=step,
            steps=total,
            epoch=epoch + 1,
            epochs=self._experiment.recipe.epochs,
            losses=losses,
            learning_rate=output.lr,
            target_decay=output.tau,
            images_per_second=speed["images_per_second"],
            views_per_image=len(self._experiment.recipe.views),
            wait_fraction=speed["data_wait"],
            idle_fraction=speed.get("device_idle"),
            memory_gib=speed["memory_gib"],
            seconds_left=per_step * (total - step),
        )

    def _waited(self) -> float:
        """Seconds that the rank which waited longest has waited for batches."""
        return self._experiment.world.max(self._experiment.loader.stats.wait_seconds)

    def log_knn(self, accuracy: dict[int, float], *, step: int) -> None:
        """Report a kNN evaluation; the first k is the headline."""
        if self._outputs is None:
            return
        headline = next(iter(accuracy.values()))
        epochs = step // self._experiment.order.steps_per_epoch
        row = {"top1": headline, **{f"top1_k{k}": value for k, value in accuracy.items()}}
        self._outputs.metrics.write({"kind": "knn", "step": step, "epoch": epochs - 1, **row})
        self._outputs.scalars.write(step, {f"knn/{name}": value for name, value in row.items()})
        logger.info(
            "kNN after epoch %d: %s",
            epochs,
            ", ".join(f"top-1 {100 * value:.2f} % (k={k})" for k, value in accuracy.items()),
        )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of an evaluation or a save out of the training speed."""
        self._device_clock.interrupt()
        began = time.perf_counter()
        yield
        pause = time.perf_counter() - began
        self._clock.paused += pause
        self._clock.mark += pause

    def sync(self) -> int:
        """Bring all metrics to the disk and return the size of metrics.jsonl in bytes (0 where it is not written)."""
        return 0 if self._outputs is None else self._outputs.metrics.sync()

    def plot(self) -> None:
        """Draw losses.png anew."""
        if self._outputs is not None:
            self._outputs.plot()

    def device_shares(self) -> Shares | None:
        """The GPU's idle shares since the first log point; None on the CPU, or where they were not measured."""
        return self._device_clock.run_shares()

    def summary(self, *, step: int) -> dict[str, Any]:
        """Images per second since the run was begun or resumed, and the share of time waited for data.

        Without the wait for the first batch, when nothing can be ready: it says nothing of a run that goes on.
        """
        seconds = time.perf_counter() - self._clock.began - self._clock.paused
        images = (step - self._first_step) * self._experiment.recipe.batch_size
        stats = self._experiment.loader.stats
        first = stats.first_wait_seconds
        waited = self._experiment.world.max(stats.wait_seconds - first)
        return {
            "seconds": seconds,
            "images_per_second": images / max(seconds, 1e-9),
            "data_wait": min(waited / max(seconds - first, 1e-9), 1.0),
        }
