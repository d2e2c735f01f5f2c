"""--batch-size auto: the largest batch whose training step fits into the GPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from mvssl.recipe import Recipe
from mvssl.training.compiled.capture import wants_capture
from mvssl.trying.step_memory import peak_step_memory
from pipelines.errors import InputError

MULTIPLE = 32
"""Batches are whole multiples of this: tensor cores and kernels like such numbers."""

_MOST = 65_536
_ROOM = 0.9  # fraction of the memory that may be taken: the loader, evaluations and fragments need some as well
_ROOM_BESIDE_GRAPH = 0.8


def largest_batch(fits: Callable[[int], bool], *, most: int = _MOST) -> int:
    """The largest multiple of `MULTIPLE` up to `most` that fits, by doubling and then by halving the gap.

    Args:
        fits: whether a batch fits; it does for every smaller one, too.
        most: largest batch to try.

    Raises:
        InputError: not even the smallest fits.
    """
    good, bad = 0, None
    size = MULTIPLE
    while size <= most and bad is None:
        good, bad = (size, None) if fits(size) else (good, size)
        size *= 2
    if good == 0:
        raise InputError(
            f"batch_size is 'auto' but not even {MULTIPLE} images fit into the GPU's memory: take --step-mode "
            "per-view, smaller views or a smaller backbone, or give a smaller number."
        )
    bad = most // MULTIPLE * MULTIPLE + MULTIPLE if bad is None else bad
    while bad - good > MULTIPLE:
        middle = (good + bad) // 2 // MULTIPLE * MULTIPLE
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def fits_on(recipe: Recipe, device: torch.device, *, cuda_graph: Literal["auto", "on", "off"]) -> Callable[[int], bool]:
    """Whether the steps of a recipe fit on a GPU and leave room for all else, by batch size.

    Args:
        recipe: whose batch size does not matter.
        device: the GPU.
        cuda_graph: as for `TrainStep` in a run of one process. A graph keeps its memory, so that evaluations and the
            loader cannot use it between steps and need more room beside it.
    """
    room = _ROOM_BESIDE_GRAPH if wants_capture(cuda_graph, device, ranks=1) else _ROOM

    def fits(batch_size: int) -> bool:
        peak = peak_step_memory(recipe, device, images=batch_size, cuda_graph=cuda_graph)
        total: int = torch.cuda.get_device_properties(device).total_memory
        return peak is not None and peak <= room * total

    return fits


def with_largest_batch(
    recipe: Recipe,
    device: torch.device,
    *,
    processes: int,
    images: int,
    cuda_graph: Literal["auto", "on", "off"],
) -> tuple[Recipe, str]:
    """The recipe with the largest batch that fits, and a sentence that says what it is and what the learning rate is.

    Args:
        recipe: whose batch size does not matter.
        device: the GPU.
        processes: of the run; each takes an equal share, and all are thought to be alike.
        images: of the data set, which a batch cannot exceed.
        cuda_graph: as for `TrainStep`.

    Raises:
        InputError: the device is no GPU, or nothing fits.
    """
    if device.type != "cuda":
        raise InputError(
            "batch_size is 'auto', which measures a GPU's memory, but the run is on the CPU: give a number, for "
            "example --batch-size 64."
        )
    tried = cuda_graph if wants_capture(cuda_graph, device, ranks=processes) else "off"
    share = largest_batch(fits_on(recipe, device, cuda_graph=tried), most=max(MULTIPLE, images // processes))
    found = replace(recipe, batch_size=share * processes)
    return found, (
        f"batch size: {found.batch_size}, the largest that fits ({share} a process); the learning rate is "
        f"{found.learning_rate:.4g}, in proportion to it (base_lr * batch_size / 256)"
    )
