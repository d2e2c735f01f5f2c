"""--profile: where the time of a step goes, as a table and as a trace."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from rich.console import Console

from mvssl.monitor.device.profiling import StepProfile, profile_steps, table, wait, write_trace
from mvssl.recipe import Recipe
from mvssl.runs.environment import environment
from mvssl.runs.options import RunOptions
from mvssl.runs.serialize import to_dict
from mvssl.trying.rehearsal import Rehearsal, rehearse
from pipelines.errors import InputError

SHOWN, WRITTEN = 12, 200  # rows of the table in the terminal and in the file
PREPARED = 4  # batches that the loader may have had ready while the step was measured alone
TRACED = 3  # steps of a trace, which grows large


def profile_run(recipe: Recipe, options: RunOptions, console: Console, *, steps: int) -> None:
    """Build the run, warm it up, measure this many steps alone and fed by the loader.

    Writes ``trace.json.gz`` (for Perfetto), ``profile.txt`` and ``profile.json`` into the folder `options.out`.

    Raises:
        InputError: as a real run would; `out` is missing or there is something.
    """
    if options.out is None:
        raise InputError("out is missing: name the folder for the trace and the table with --out PATH.")
    folder = options.out

    def check(_: Console) -> None:
        if folder.exists() and not options.overwrite:
            raise InputError(
                f"out is {str(folder)!r}, which exists: name another folder with --out, or give --overwrite to replace "
                "the profile in it."
            )

    with rehearse(recipe, options, console, check=check) as rehearsal:
        experiment = rehearsal.experiment
        rehearsal.first_steps()
        profile = profile_steps(rehearsal.step, steps=steps, device=experiment.device)
        fed = _fed_by_the_loader(rehearsal, steps=steps)
        lines = summary(profile, rehearsal, fed=fed)
        if experiment.world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_trace(
                rehearsal.step, steps=min(steps, TRACED), device=experiment.device, path=folder / "trace.json.gz"
            )
            _write(folder, lines, profile, recipe, fed=fed)
        else:  # which a step of several ranks waits for
            for _ in range(min(steps, TRACED)):
                rehearsal.step()
        shown = [*lines, *table(profile.entries, milliseconds=profile.milliseconds, rows=SHOWN)]
        rehearsal.console.print("\n".join(shown), highlight=False, markup=False, soft_wrap=True)
        rehearsal.console.print(f"all of it: {folder}", highlight=False, markup=False, soft_wrap=True)


def summary(profile: StepProfile, rehearsal: Rehearsal, *, fed: float | None) -> list[str]:
    """What was measured in a few lines of plain text."""
    experiment = rehearsal.experiment
    images = experiment.recipe.batch_size
    lines = [
        f"{experiment.recipe.name}, batch {images}, on {experiment.device}, {experiment.step.description}",
        f"step alone      {profile.milliseconds:.2f} ms, {1e3 * images / profile.milliseconds:,.0f} source images/s; "
        f"the host is done after {profile.host_milliseconds:.2f} ms",
    ]
    if fed is not None:
        more = 100 * (fed / profile.milliseconds - 1)
        lines.append(f"with the loader {fed:.2f} ms, {1e3 * images / fed:,.0f} source images/s ({more:+.1f} % time)")
    if profile.busy_milliseconds is not None and profile.busy_share is not None:
        lines.append(
            f"GPU at work     {profile.busy_milliseconds:.2f} ms, {100 * profile.busy_share:.1f} %, in "
            f"{profile.kernels:,.0f} kernels by {profile.launches:,.0f} launches"
        )
        lines.append(f"what holds it   {profile.what_holds()}")
    return lines


def _fed_by_the_loader(rehearsal: Rehearsal, *, steps: int) -> float | None:
    """Milliseconds from step to step on batches of the loader; None where the run has too few of them."""
    device, taken = rehearsal.experiment.device, 0
    began = time.perf_counter()
    for batch in islice(rehearsal.batches, PREPARED + steps):
        if taken == PREPARED:
            wait(device)
            began = time.perf_counter()
        rehearsal.batch = batch
        rehearsal.step()
        taken += 1
    wait(device)
    return 1e3 * (time.perf_counter() - began) / (taken - PREPARED) if taken > PREPARED else None


def _write(folder: Path, lines: list[str], profile: StepProfile, recipe: Recipe, *, fed: float | None) -> None:
    """Write the table and the numbers."""
    rows = table(profile.entries, milliseconds=profile.milliseconds, rows=WRITTEN)
    (folder / "profile.txt").write_text("\n".join([*lines, "", *rows]) + "\n", encoding="utf-8")
    numbers = asdict(profile) | {
        "busy_share": profile.busy_share,
        "fed_milliseconds": fed,
        "recipe": to_dict(recipe),
        "environment": environment(),
    }
    (folder / "profile.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
