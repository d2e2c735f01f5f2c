"""GPU memory of training steps: what they take, the largest batch that fits, advice when it runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from mvssl.config.options import Execution
from mvssl.config.recipe import Recipe
from mvssl.methods import get_method
from mvssl.models.backbones import build_backbone
from mvssl.models.checkpointing import find_blocks
from mvssl.training.cuda_graph import wants_capture
from mvssl.training.step import TrainStep, needs_target_network
from pipelines.runtime import InputError

MULTIPLE = 32
"""Automatic batch sizes are multiples of this, which suits tensor cores and kernels."""

_LARGEST = 65_536
# Fractions of GPU memory that steps may take: the loader, evaluations and fragmentation need some too, and a CUDA graph
# never releases its own between steps.
_USABLE = 0.9
_USABLE_WITH_GRAPH = 0.8


@contextmanager
def explain_out_of_memory(
    recipe: Recipe, execution: Execution, *, ranks: int = 1, begun: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Turn CUDA's out-of-memory error into an `InputError` with the remedies.

    Args:
        recipe: of the run.
        execution: of its steps.
        ranks: number of processes.
        begun: whether the run folder exists by now, so that the command needs --resume.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = remedies(recipe, execution, ranks=ranks)
        command = "continue with --resume and " if begun() else "add "
        smaller = "lower --batch-size, which takes a new run"
        raise InputError(
            f"The GPU's memory is full ({str(error).splitlines()[0]}): "
            + (f"{command}{', or '.join(words)}, or {smaller}" if words else smaller)
            + "; --dry-run shows how much memory a recipe takes."
        ) from error


def remedies(recipe: Recipe, execution: Execution, *, ranks: int) -> list[str]:
    """Options that take less memory than these and that a resumed run may have, each with what it does."""
    words = []
    if not execution.checkpointing and recomputes(recipe):
        words.append("--checkpointing, which computes activations again in the backward")
    if execution.step_mode == "joint" and sum(view.task is not None for view in recipe.views) > 1:
        words.append("--step-mode per-view, which processes one view at a time")
    method = get_method(recipe.method)
    images = recipe.batch_size // ranks
    splits = [n for n in range(recipe.accumulate + 1, images // 2 + 1) if images % n == 0]
    if splits and (method.keys != "all" or needs_target_network(recipe, method)):
        words.append(f"--accumulate {splits[0]}, which splits the batch into micro-batches")
    if execution.cuda_graph != "off":
        words.append("--cuda-graph off, which frees memory between steps")
    return words


def recomputes(recipe: Recipe) -> bool:
    """Whether the backbone has blocks whose activations `Execution.checkpointing` can compute again."""
    with torch.random.fork_rng(devices=[]):
        return bool(find_blocks(build_backbone(recipe.backbone)))


def peak_step_memory(recipe: Recipe, execution: Execution, device: torch.device, *, images: int) -> int | None:
    """Peak bytes that torch reserves on a GPU while one process takes steps; None if they do not fit.

    A CUDA graph's memory is included. Steps are not compiled, which takes more. Leaves the random generators unchanged.

    Args:
        recipe: its batch size is ignored.
        execution: as for `TrainStep`, in a run of one process.
        device: the GPU.
        images: batch size of this process.
    """
    recipe, execution = replace(recipe, batch_size=images), replace(execution, compile="off")
    _free()
    torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            _take_steps(recipe, execution, device)
        except torch.OutOfMemoryError:
            return None
        finally:
            _free()
    return torch.cuda.max_memory_reserved(device)


def _take_steps(recipe: Recipe, execution: Execution, device: torch.device) -> None:
    """Take every kind of step that a run has: warm-up, the recorded one and a replay."""
    step = TrainStep(recipe, execution=execution, device=device, total_steps=8, steps_per_epoch=8)
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
    """Release the memory of steps; a step has reference cycles, so only the collector frees it."""
    gc.collect()
    torch.cuda.empty_cache()


def with_largest_batch(
    recipe: Recipe, execution: Execution, device: torch.device, *, processes: int, images: int
) -> tuple[Recipe, str]:
    """The recipe with the largest batch that fits, and a sentence with batch size and learning rate.

    Args:
        recipe: its batch size is ignored.
        execution: as for `TrainStep`.
        device: the GPU.
        processes: of the run, on GPUs of the same kind; each takes an equal part of the batch.
        images: of the data set, which a batch cannot exceed.
    """
    if device.type != "cuda":
        raise InputError(
            "batch_size is 'auto', which measures a GPU's memory, but the run is on the CPU: give a number, for "
            "example --batch-size 64."
        )
    if not wants_capture(execution.cuda_graph, device, ranks=processes):
        execution = replace(execution, cuda_graph="off")
    per_rank = largest_batch(fits_on(recipe, execution, device), most=max(MULTIPLE, images // processes))
    found = replace(recipe, batch_size=per_rank * processes)
    return found, (
        f"batch size: {found.batch_size}, the largest that fits ({per_rank} a process); the learning rate is "
        f"{found.learning_rate:.4g}, in proportion to it (base_lr * batch_size / 256)"
    )


def fits_on(recipe: Recipe, execution: Execution, device: torch.device) -> Callable[[int], bool]:
    """Function of the batch size: whether steps fit on a GPU and leave enough memory for everything else."""
    usable = _USABLE_WITH_GRAPH if wants_capture(execution.cuda_graph, device, ranks=1) else _USABLE

    def fits(batch_size: int) -> bool:
        peak = peak_step_memory(recipe, execution, device, images=batch_size)
        total: int = torch.cuda.get_device_properties(device).total_memory
        return peak is not None and peak <= usable * total

    return fits


def largest_batch(fits: Callable[[int], bool], *, most: int = _LARGEST) -> int:
    """The largest multiple of `MULTIPLE` up to `most` that fits, by doubling, then bisection."""
    good, bad = 0, None
    size = MULTIPLE
    while size <= most and bad is None:
        good, bad = (size, None) if fits(size) else (good, size)
        size *= 2
    if good == 0:
        raise InputError(
            f"batch_size is 'auto' but not even {MULTIPLE} images fit into the GPU's memory: take "
            "--checkpointing, --step-mode per-view, smaller views or a smaller backbone, or give a smaller number."
        )
    bad = most // MULTIPLE * MULTIPLE + MULTIPLE if bad is None else bad
    while bad - good > MULTIPLE:
        middle = (good + bad) // 2 // MULTIPLE * MULTIPLE
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
