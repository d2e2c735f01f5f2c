"""Losses, gradients or weights that are not finite: stop, and leave what led there."""

from __future__ import annotations

import torch

from mvssl.experiment import Experiment
from mvssl.monitor.window import Window
from mvssl.runs.folder import RunFolder, write_json
from mvssl.runs.serialize import to_dict
from pipelines.errors import InputError

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
