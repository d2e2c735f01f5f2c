"""--batch-size auto: the largest batch whose training step fits into the GPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from mvssl.recipe import Recipe
from mvssl.training.step import TrainStep
from pipelines.errors import InputError

MULTIPLE = 32
"""Batches are whole multiples of this: tensor cores and kernels like such numbers."""

_MOST = 65_536
_ROOM = 0.9  # share of the memory that may be taken: the loader, evaluations and fragments need some as well


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


def fits_on(recipe: Recipe, device: torch.device) -> Callable[[int], bool]:
    """Whether two steps of a recipe fit on a GPU, by batch size. Steps are not compiled, which takes more memory."""

    def fits(batch_size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step = None
        try:
            tried = replace(recipe, batch_size=batch_size, compile="off")
            step = TrainStep(tried, device=device, total_steps=4, steps_per_epoch=4, cuda_graph="off")
            images = batch_size
            views = [
                torch.randn(images, 3, view.size, view.size, device=device, dtype=step.input_dtype).contiguous(
                    memory_format=torch.channels_last
                )
                for view in recipe.views
            ]
            for number in range(2):
                step(views, number)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            return False
        finally:
            del step
            torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_reserved(device) <= _ROOM * total

    return fits


def with_largest_batch(recipe: Recipe, device: torch.device, *, processes: int, images: int) -> tuple[Recipe, str]:
    """The recipe with the largest batch that fits, and a sentence that says what it is and what the learning rate is.

    Args:
        recipe: whose batch size does not matter.
        device: the GPU.
        processes: of the run; each takes an equal share, and all are thought to be alike.
        images: of the data set, which a batch cannot exceed.

    Raises:
        InputError: the device is no GPU, or nothing fits.
    """
    if device.type != "cuda":
        raise InputError(
            "batch_size is 'auto', which measures a GPU's memory, but the run is on the CPU: give a number, for "
            "example --batch-size 64."
        )
    share = largest_batch(fits_on(recipe, device), most=max(MULTIPLE, images // processes))
    found = replace(recipe, batch_size=share * processes)
    return found, (
        f"batch size: {found.batch_size}, the largest that fits ({share} a process); the learning rate is "
        f"{found.learning_rate:.4g}, in proportion to it (base_lr * batch_size / 256)"
    )
