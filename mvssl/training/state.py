"""What a checkpoint of a run holds, put together and taken apart again."""

from __future__ import annotations

from dataclasses import dataclass

from mvssl.config.serialize import to_dict
from mvssl.runs import checkpoint
from mvssl.runs.folder import RunFolder
from mvssl.training.experiment import Experiment
from mvssl.training.metric_buffer import Window
from mvssl.weights.backbone_file import export_backbone
from pipelines.runtime import InputError


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        metrics_bytes: size of metrics.jsonl then; what a killed run wrote beyond it is cut off.
        evaluated: False if the evaluation due after this step is yet to be made.
    """

    step: int = 0
    metrics_bytes: int = 0
    evaluated: bool = True


def save_state(experiment: Experiment, folder: RunFolder, window: Window, position: Position) -> None:
    """Write a checkpoint, then the exported backbone.

    Raises:
        InputError: one of them cannot be written; earlier checkpoints are untouched.
    """
    checkpoint.save(
        folder.checkpoints,
        step=position.step,
        state={
            "step": experiment.step.state_dict(),
            "window": window.state_dict(),
        },
        meta={
            "recipe": to_dict(experiment.recipe),
            "data": experiment.source.fingerprint,
            "metrics_bytes": position.metrics_bytes,
            "evaluated": position.evaluated,
        },
        keep=experiment.options.keep_checkpoints,
    )
    export_backbone(experiment.step.online.backbone, experiment.recipe.backbone.name, folder.backbone)


def restore_state(experiment: Experiment, folder: RunFolder, window: Window) -> Position:
    """Put networks, optimiser and window back as they were when the last checkpoint was made, on any number of ranks.

    Rank 0 reads it for all. The exported backbone is written anew: a kill may have come between the two.

    Raises:
        InputError: the checkpoint is damaged, or the run was begun with other images.
    """
    saved = experiment.world.on_main(lambda: checkpoint.load(folder.last))
    if saved.meta["data"] != experiment.source.fingerprint:
        raise InputError(
            f"data is {str(experiment.options.data)!r} but the run was begun with other images (their names, sizes or "
            "labels differ): give the data set the run was begun with, or begin a new run."
        )
    experiment.step.load_state_dict(saved.state["step"])
    window.load_state_dict(saved.state["window"], experiment.device)
    experiment.world.on_main(
        lambda: export_backbone(experiment.step.online.backbone, experiment.recipe.backbone.name, folder.backbone)
    )
    return Position(
        step=int(saved.meta["step"]),
        metrics_bytes=int(saved.meta["metrics_bytes"]),
        evaluated=bool(saved.meta["evaluated"]),
    )
