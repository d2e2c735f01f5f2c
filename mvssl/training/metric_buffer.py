"""Metrics of the steps since the last log point, kept on the device so that no step waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvssl.distributed import World
from mvssl.training.step import StepOutput


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """The first step whose loss or gradient was not finite, and the dataset indices of its images."""

    step: int
    grad_norm: float
    losses: list[float]
    index: list[int]


class MetricBuffer:
    """Metrics and image indices of the steps since the last log point, on the device, so that no step waits for it."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []  # each [2 + T]: gradient norm, total loss, loss of each task
        self._index: list[Tensor] = []  # each int64 [B]
        self._averaged = 0  # rows already averaged over the ranks
        self._loaded = 0  # rows of a checkpoint, checked before it was saved, maybe in another precision

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, output: StepOutput, index: Tensor) -> None:
        """Add one step and the dataset indices of its images, int64 [B]."""
        scalars = torch.stack([output.grad_norm.float(), output.loss.float()])
        self._rows.append(torch.cat([scalars, output.losses.float()]))  # [2 + T]
        self._index.append(index)

    def average(self, world: World) -> None:
        """Average over the ranks, each row once.

        On 3 ranks and more the mean of equal numbers differs from them by rounding, so that averaging again at a save
        between two log points would change the metrics.
        """
        new = self._rows[self._averaged :]
        if new:
            self._rows[self._averaged :] = world.mean(torch.stack(new)).unbind()
        self._averaged = len(self._rows)

    def rows(self) -> Tensor:
        """Gradient norm, loss and losses, float64 [steps, 2 + T] on the CPU. Waits for the device."""
        return torch.stack(self._rows).double().cpu()

    def non_finite(self, *, last_step: int, gradients: bool = True) -> NonFinite | None:
        """The first step whose loss (or gradient norm, if `gradients`) is NaN or infinite. Waits for the device."""
        if not self._rows:
            return None
        rows = self.rows()
        checked = rows if gradients else rows[:, 1:]
        bad = [row for row in (~checked.isfinite().all(dim=1)).nonzero().flatten().tolist() if row >= self._loaded]
        if not bad:
            return None
        first = bad[0]
        return NonFinite(
            step=last_step - len(self._rows) + 1 + first,
            grad_norm=float(rows[first, 0]),
            losses=rows[first, 1:].tolist(),
            index=self._index[first].tolist(),
        )

    def clear(self) -> None:
        """Empty the buffer."""
        self._rows.clear()
        self._index.clear()
        self._averaged = self._loaded = 0

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint between two log points; the rows must be averaged."""
        return {"rows": [row.cpu() for row in self._rows], "index": list(self._index)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore `state_dict`."""
        self._rows = [row.to(device) for row in state["rows"]]
        self._index = list(state["index"])
        self._averaged = self._loaded = len(self._rows)
