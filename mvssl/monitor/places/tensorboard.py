"""TensorBoard event files, where the package is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class NoWriter:
    """Writes nothing: TensorBoard is not installed."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Drop the scalars."""

    def close(self) -> None:
        """Nothing to close."""


class TensorBoardWriter:
    """Writes event files into a folder."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # fails where tensorboard is missing

        # purge_step hides what a run killed after its last checkpoint had written beyond it.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def make_tensorboard_writer(folder: Path, *, first_step: int) -> TensorBoardWriter | NoWriter:
    """A TensorBoard writer, or one that writes nothing where TensorBoard is not installed."""
    try:
        return TensorBoardWriter(folder, first_step=first_step)
    except ImportError:
        return NoWriter()
