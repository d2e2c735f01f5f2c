"""--dry-run: everything a run needs, two steps of it, and nothing left behind."""

from __future__ import annotations

import time
from contextlib import ExitStack
from itertools import chain

import torch
from rich.console import Console

from mvssl.distributed import join_world, process_local_rank
from mvssl.environment import peak_memory_gib
from mvssl.experiment import open_experiment
from mvssl.init_from import init_from
from mvssl.memory import explain_out_of_memory
from mvssl.options import RunOptions, resolve_device
from mvssl.recipe import Recipe
from mvssl.run_folder import RunFolder
from pipelines.errors import InputError

STEPS = 2


def dry_run(recipe: Recipe, options: RunOptions, console: Console) -> None:
    """Build the whole run, take two steps, report memory and speed; writes no file.

    Raises:
        InputError: as a real run would, and where the run is shorter than two steps.
    """
    device = resolve_device(options.device, local_rank=process_local_rank())
    with ExitStack() as stack:
        world = stack.enter_context(join_world(cuda=device.type == "cuda"))
        console = console if world.is_main else Console(quiet=True)
        world.on_main(lambda: _check_out(recipe, options, console))
        experiment = stack.enter_context(open_experiment(recipe, options, console, world))
        stack.enter_context(explain_out_of_memory())
        init_from(experiment.step, recipe, options.init_from)
        if experiment.total_steps < STEPS:
            raise InputError(
                f"The whole run is {experiment.total_steps} step but a dry run takes {STEPS}: lower --batch-size or "
                "train for more epochs."
            )
        times: list[float] = []
        losses: list[float] = []
        for step, batch in zip(
            range(STEPS), chain.from_iterable(map(experiment.loader.epoch, range(recipe.epochs))), strict=False
        ):
            began = time.perf_counter()
            output = experiment.step(batch.views, step)
            losses.append(float(world.mean(output.loss)))  # waits for the device
            times.append(time.perf_counter() - began)
        parameters = sum(p.numel() for p in experiment.step.online.parameters())
        images = recipe.batch_size / times[-1]
        loss = ", ".join(f"{value:.4f}" for value in losses)
        finite = all(torch.isfinite(torch.tensor(losses)))
        console.print(
            f"dry run of {recipe.name} on {experiment.device}: {len(experiment.source):,} images, "
            f"{experiment.total_steps:,} steps in all\n"
            f"  online network  {parameters / 1e6:.1f} M parameters\n"
            f"  loss            {loss}{'' if finite else '  (not finite: lower --optimizer.base-lr)'}\n"
            f"  step            {times[-1]:.3f} s, {images:,.0f} source images/s, {images * len(recipe.views):,.0f} "
            "views/s (the step alone, without loading)\n"
            f"  batch           {recipe.batch_size}, {recipe.batch_size // world.size} a process ({world.size})\n"
            f"  memory          {peak_memory_gib(experiment.device):.2f} GiB at peak\n"
            "nothing was written",
            highlight=False,
            soft_wrap=True,
        )


def _check_out(recipe: Recipe, options: RunOptions, console: Console) -> None:
    """Say what the real run would find in its folder.

    Raises:
        InputError: the run there, which is to be resumed, has another recipe.
    """
    if options.out is None:
        return
    if options.resume:
        RunFolder(options.out).check_same_recipe(recipe)
    elif options.out.exists() and not options.overwrite:
        console.print(f"note: {options.out} exists; the real run will need --resume or --overwrite", highlight=False)
