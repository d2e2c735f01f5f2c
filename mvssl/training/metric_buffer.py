"""What happened since the last log point, kept on the device until then so that no step waits for the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvssl.distributed import World
from mvssl.training.step import StepOutput


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """The first step whose loss or gradient was not finite: what led there."""

    step: int
    grad_norm: float
    losses: list[float]
    index: list[int]


class Window:
    """Losses and image indices of the steps since the last log point."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []  # each [2 + T]: gradient norm, total loss, loss of each task
        self._index: list[Tensor] = []  # each int64 [B]
        self._averaged = 0  # rows that are means over the ranks already

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, output: StepOutput, index: Tensor) -> None:
        """Note one step and the dataset index of its images, int64 [B]."""
        scalars = torch.stack([output.grad_norm.float(), output.loss.float()])
        self._rows.append(torch.cat([scalars, output.losses.float()]))  # [2 + T]
        self._index.append(index)

    def average(self, world: World) -> None:
        """Take the mean over the ranks, so that all have the numbers of the whole batch and judge alike.

        Each row once: the mean of equal numbers differs from them by rounding on 3 ranks and more, and then a save
        between two log points would show in the metrics.
        """
        new = self._rows[self._averaged :]
        if new:
            self._rows[self._averaged :] = world.mean(torch.stack(new)).unbind()
        self._averaged = len(self._rows)

    def rows(self) -> Tensor:
        """Gradient norm, loss and losses as a float64 [steps, 2 + T] tensor on the CPU. Waits for the device."""
        return torch.stack(self._rows).double().cpu()

    def non_finite(self, *, last_step: int, gradients: bool = True) -> NonFinite | None:
        """The first step whose loss (or gradient norm, if `gradients`) is NaN or infinite. Waits for the device."""
        if not self._rows:
            return None
        rows = self.rows()
        judged = rows if gradients else rows[:, 1:]
        bad = (~judged.isfinite().all(dim=1)).nonzero().flatten().tolist()  # steps within the window
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
        """Begin a new window."""
        self._rows.clear()
        self._index.clear()
        self._averaged = 0

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint made between two log points, of rows that are averaged."""
        return {"rows": [row.cpu() for row in self._rows], "index": list(self._index)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore `state_dict`."""
        self._rows = [row.to(device) for row in state["rows"]]
        self._index = list(state["index"])
        self._averaged = len(self._rows)
