"""What a run comes to: its result, or where it was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvssl.monitor.places.jsonl import read_jsonl
from mvssl.runs.folder import RunFolder


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
