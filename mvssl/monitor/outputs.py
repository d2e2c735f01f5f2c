"""Where the numbers of a run go: files of its folder and the display. Only rank 0 has them open."""

from __future__ import annotations

from rich.console import Console

from mvssl.monitor.display.progress import make_display
from mvssl.monitor.pages.plots import plot_losses
from mvssl.monitor.places.jsonl import JsonLines, complete_bytes
from mvssl.monitor.places.scalars import make_scalar_writers
from mvssl.runs.folder import RunFolder
from mvssl.runs.options import RunOptions


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
