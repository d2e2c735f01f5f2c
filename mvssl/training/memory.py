"""How much of a GPU's memory training steps take, found out by taking some.

What to do when the device's memory is full.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch

from mvssl.config.recipe import Recipe
from mvssl.training.step import TrainStep
from pipelines.runtime import InputError


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn CUDA's out-of-memory error into a sentence with the remedy.

    Raises:
        InputError: the device has too little memory for what the block does.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"The GPU's memory is full ({str(error).splitlines()[0]}): add --step-mode per-view, which holds one "
            "view at a time, or --accumulate 2, which takes the batch in parts, or lower --batch-size; --cuda-graph "
            "off gives memory back between steps; --dry-run tells how much a recipe takes."
        ) from error


def peak_step_memory(
    recipe: Recipe, device: torch.device, *, images: int, cuda_graph: Literal["auto", "on", "off"]
) -> int | None:
    """Bytes that torch has reserved on a GPU at most while one process takes steps; None if they do not fit.

    A CUDA graph counts with its own memory. Steps are not compiled, which takes more. What is drawn later is not
    changed by this.

    Args:
        recipe: whose batch size does not matter.
        device: the GPU.
        images: of a step of this process.
        cuda_graph: as for `TrainStep`, in a run of one process.
    """
    tried = replace(recipe, batch_size=images, compile="off")
    devices = [device] if device.type == "cuda" else []
    _free()
    torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng(devices):
        try:
            _take_steps(tried, device, cuda_graph)
        except torch.OutOfMemoryError:
            return None
        finally:
            _free()
    return torch.cuda.max_memory_reserved(device)


def _take_steps(recipe: Recipe, device: torch.device, cuda_graph: Literal["auto", "on", "off"]) -> None:
    """All kinds of steps that a run has: the first ones, the recorded one and its replays."""
    step = TrainStep(recipe, device=device, total_steps=8, steps_per_epoch=8, cuda_graph=cuda_graph)
    views = [
        torch.randn(recipe.batch_size, 3, view.size, view.size, device=device, dtype=step.input_dtype).contiguous(
            memory_format=torch.channels_last
        )
        for view in recipe.views
    ]
    for number in range(step.warm_up + 1):
        step(views, number)
    torch.cuda.synchronize(device)


def _free() -> None:
    """Give back what steps have taken; a step refers to itself, so only the collector finds it."""
    gc.collect()
    torch.cuda.empty_cache()
