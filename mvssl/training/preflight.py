"""--dry-run: everything a run needs, some steps of it, and nothing left behind.

--batch-size auto: the largest batch whose training step fits into the GPU's memory.

--profile: where the time of a step goes, as a table and as a trace.

A run that is built and takes steps but leaves nothing: what --dry-run and --profile share.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from mvssl.config.options import RunOptions, resolve_device
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.distributed import join_world, process_local_rank
from mvssl.monitor.profiling import StepProfile, profile_steps, table, wait, write_trace
from mvssl.runs.environment import environment, peak_memory_gib
from mvssl.runs.folder import RunFolder
from mvssl.training.cuda_graph import wants_capture
from mvssl.training.experiment import Experiment, open_experiment
from mvssl.training.memory import explain_out_of_memory, peak_step_memory
from mvssl.training.step import StepOutput
from mvssl.weights.init_from import init_from
from pipelines.batch import ViewBatch
from pipelines.runtime import InputError

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


FIRST = 2
"""Steps on batches of their own: the first one compiles, the second one shows that there is a next one."""


@dataclass
class Rehearsal:
    """A run that has been built.

    Attributes:
        experiment: its parts.
        console: where to report; quiet on all ranks but one.
        batches: of the run, in their order, epoch after epoch.
        batch: the last one that was taken.
        taken: steps so far.
        seconds: of the last step, until the device had done it.
    """

    experiment: Experiment
    console: Console
    batches: Iterator[ViewBatch]
    batch: ViewBatch
    taken: int = 0
    seconds: float = 0.0

    def step(self) -> StepOutput:
        """One update on the last batch. Steps beyond the run's end are as its last one."""
        output = self.experiment.step(self.batch.views, min(self.taken, self.experiment.total_steps - 1))
        self.taken += 1
        return output

    def first_steps(self) -> list[float]:
        """Take steps until all that follow are alike; the losses of the first ones, which have batches of their own."""
        losses: list[float] = []
        while self.taken < max(FIRST, self.experiment.step.warm_up):
            if 0 < self.taken < FIRST:
                self.batch = next(self.batches)
            began = time.perf_counter()
            output = self.step()
            loss = float(self.experiment.world.mean(output.loss))  # waits for the device
            self.seconds = time.perf_counter() - began
            if self.taken <= FIRST:
                losses.append(loss)
        return losses


@contextmanager
def rehearse(
    recipe: Recipe, options: RunOptions, console: Console, *, check: Callable[[Console], None]
) -> Iterator[Rehearsal]:
    """Build the whole run and take its first batch, after `check` has found on the first rank that it may be.

    Raises:
        InputError: as a real run would, and where the run is shorter than two steps.
    """
    device = resolve_device(options.device, local_rank=process_local_rank())
    with ExitStack() as stack:
        world = stack.enter_context(join_world(cuda=device.type == "cuda"))
        console = console if world.is_main else Console(quiet=True)
        world.on_main(lambda: check(console))
        experiment = stack.enter_context(open_experiment(recipe, options, console, world))
        stack.enter_context(explain_out_of_memory())
        init_from(experiment.step.online, experiment.step.target, recipe, options.init_from)
        if experiment.total_steps < FIRST:
            raise InputError(
                f"The whole run is {experiment.total_steps} step but {FIRST} are needed to measure one: lower "
                "--batch-size or train for more epochs."
            )
        batches = chain.from_iterable(map(experiment.loader.epoch, range(recipe.epochs)))
        yield Rehearsal(experiment=experiment, console=console, batches=batches, batch=next(batches))


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
