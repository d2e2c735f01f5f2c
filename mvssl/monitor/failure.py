"""A loss that is not finite: stop, and leave what led there."""

from __future__ import annotations

from mvssl.experiment import Experiment
from mvssl.monitor.window import Window
from mvssl.run_folder import RunFolder, write_json
from mvssl.serialize import to_dict
from pipelines.errors import InputError


class Diverged(InputError):
    """The loss became NaN or infinite; what led there is in failure.json, the last good checkpoint is untouched."""


def check_finite(experiment: Experiment, folder: RunFolder, window: Window, step: int) -> None:
    """Check the losses since the last log point. Waits for the device.

    Raises:
        Diverged: one is not finite; failure.json names the first such step, its losses and its images.
    """
    failure = window.non_finite(last_step=step)
    if failure is None:
        return
    write_json(
        folder.failure,
        {
            "step": failure.step,
            "epoch": (failure.step - 1) // experiment.order.steps_per_epoch,
            "losses": [repr(loss) for loss in failure.losses],
            "index": failure.index,
            "keys": [experiment.source.key(i) for i in failure.index],
            "recipe": to_dict(experiment.recipe),
        },
    )
    raise Diverged(
        f"The loss of step {failure.step} is not finite; its images are listed in {folder.failure} and the last "
        "checkpoint is from before it: lower --optimizer.base-lr, or use --precision fp32 or bf16, and start anew."
    )
