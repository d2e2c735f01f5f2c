"""--dry-run: everything a run needs, some steps of it, and nothing left behind."""

from __future__ import annotations

import math

import torch
from rich.console import Console

from mvssl.monitor.device.profiling import profile_steps
from mvssl.recipe import Recipe
from mvssl.runs.environment import peak_memory_gib
from mvssl.runs.folder import RunFolder
from mvssl.runs.options import RunOptions
from mvssl.trying.rehearsal import rehearse

PROFILED = 3  # steps on a GPU: enough for launches and the share of time that it works


def dry_run(recipe: Recipe, options: RunOptions, console: Console) -> None:
    """Build the whole run, take some steps, report memory, speed and what holds the device; writes no file.

    Raises:
        InputError: as a real run would, and where the run is shorter than two steps.
    """

    def check(speaker: Console) -> None:
        _check_out(recipe, options, speaker)

    with rehearse(recipe, options, console, check=check) as rehearsal:
        experiment = rehearsal.experiment
        losses = rehearsal.first_steps()
        seconds, ranks = rehearsal.seconds, experiment.world.size
        launches = ""
        if on_gpu(experiment.device):
            profile = profile_steps(rehearsal.step, steps=PROFILED, device=experiment.device)
            seconds = profile.milliseconds / 1e3
            launches = (
                f"  launches        {profile.launches:,.0f} a step, of {profile.kernels:,.0f} kernels; "
                f"{experiment.step.description}\n"
                f"  GPU at work     {100 * (profile.busy_share or 0):.1f} % of a step; what holds it otherwise: "
                f"{profile.what_holds()}\n"
            )
        parameters = sum(p.numel() for p in experiment.step.online.parameters())
        images = recipe.batch_size / seconds
        loss = ", ".join(f"{value:.4f}" for value in losses)
        finite = all(map(math.isfinite, losses))
        rehearsal.console.print(
            f"dry run of {recipe.name} on {experiment.device}: {len(experiment.source):,} images, "
            f"{experiment.total_steps:,} steps in all\n"
            f"  online network  {parameters / 1e6:.1f} M parameters\n"
            f"  loss            {loss}{'' if finite else '  (not finite: lower --optimizer.base-lr)'}\n"
            f"  step            {seconds:.3f} s, {images:,.0f} source images/s, {images * len(recipe.views):,.0f} "
            "views/s (the step alone, without loading)\n"
            f"{launches}"
            f"  batch           {recipe.batch_size}, {recipe.batch_size // ranks} a process ({ranks})\n"
            f"  memory          {peak_memory_gib(experiment.device):.2f} GiB at peak\n"
            "nothing was written",
            highlight=False,
            soft_wrap=True,
        )


def on_gpu(device: torch.device) -> bool:
    """Whether there are launches to count."""
    return device.type == "cuda"


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
