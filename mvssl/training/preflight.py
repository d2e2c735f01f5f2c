"""--dry-run and --profile: build the whole run, take some steps and measure them, without training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from rich.console import Console

from mvssl.config.device import resolve_device
from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.distributed import join_world
from mvssl.monitor.profiling import StepProfile, format_table, profile_steps, synchronize, write_trace
from mvssl.ranks import process_local_rank
from mvssl.runs.environment import environment, peak_memory_gib
from mvssl.runs.folder import RunFolder
from mvssl.training.experiment import Experiment, open_experiment
from mvssl.training.memory import explain_out_of_memory
from mvssl.training.step import StepOutput
from mvssl.weights.init_from import init_from
from mvssl.weights.pretrained import resolve_pretrained
from pipelines.batch import ViewBatch
from pipelines.files import write_whole
from pipelines.names import say, visible
from pipelines.progress import duration, rate
from pipelines.runtime import InputError

FIRST = 2  # steps on batches of their own: the first one compiles, the second one shows that the loader continues
DRY_RUN_STEPS = 3  # profiled steps of --dry-run on a GPU, enough for launches and GPU utilisation
TRACE_STEPS = 3  # few: traces grow large
PREPARED = 4  # batches that the loader may have prepared while the step was measured alone
SHOWN, WRITTEN = 12, 200  # rows of the profile's table in the terminal and in the file


def dry_run(recipe: Recipe, options: RunOptions, console: Console) -> None:
    """Build the whole run, take some steps, report memory, speed and the bottleneck; writes no file."""

    def check(console: Console) -> None:
        if options.out is None:
            return
        if options.resume:
            RunFolder(options.out).check_same_recipe(recipe, extend=options.extend)
        elif options.out.exists() and not options.overwrite:
            say(console, f"note: {options.out} exists; the real run will need --resume or --overwrite")

    with open_trial(recipe, options, console, check=check) as trial:
        experiment, ranks = trial.experiment, trial.experiment.world.size
        losses = trial.first_steps()
        seconds = trial.seconds
        gpu: tuple[str, ...] = ()
        if _on_gpu(experiment.device):
            profile = profile_steps(trial.step, steps=DRY_RUN_STEPS, device=experiment.device)
            seconds = profile.milliseconds / 1e3
            gpu = (
                f"  launches        {profile.launches:,.0f} a step, of {profile.kernels:,.0f} kernels; "
                f"{experiment.step.description}",
                f"  GPU busy        {100 * (profile.busy_share or 0):.1f} % of a step; bottleneck: "
                f"{profile.bottleneck()}",
            )
        parameters = sum(p.numel() for p in experiment.step.online.parameters())
        images = recipe.batch_size / seconds
        loss = ", ".join(f"{value:.4f}" for value in losses)
        finite = all(map(math.isfinite, losses))
        say(
            trial.console,
            f"dry run of {recipe.name} on {experiment.device}: {len(experiment.source):,} images, "
            f"{experiment.total_steps:,} steps in all",
            f"  online network  {parameters / 1e6:.1f} M parameters",
            f"  loss            {loss}{'' if finite else '  (not finite: lower --optimizer.base-lr)'}",
            f"  step            {seconds:.3f} s, {rate(images)} source images/s, {rate(images * len(recipe.views))} "
            "views/s (the step alone, without loading)",
            *gpu,
            f"  batch           {recipe.batch_size}, {recipe.batch_size // ranks} a process ({ranks})",
            f"  whole run       about {duration(seconds * experiment.total_steps)} at this speed",
            f"  memory          {peak_memory_gib(experiment.device):.2f} GiB at peak",
            "nothing was written",
        )


def profile_run(recipe: Recipe, options: RunOptions, console: Console, *, steps: int) -> None:
    """Build the run, warm it up, measure this many steps alone and fed by the loader.

    Writes ``trace.json.gz`` (for Perfetto), ``profile.txt`` and ``profile.json`` into the folder `options.out`.
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

    with open_trial(recipe, options, console, check=check) as trial:
        experiment, trace_steps = trial.experiment, min(steps, TRACE_STEPS)
        trial.first_steps()
        profile = profile_steps(trial.step, steps=steps, device=experiment.device)
        fed = trial.fed_by_the_loader(steps)
        lines = _summary(profile, experiment, fed=fed)
        if experiment.world.is_rank0:
            folder.mkdir(parents=True, exist_ok=True)
            write_trace(trial.step, steps=trace_steps, device=experiment.device, path=folder / "trace.json.gz")
            _write_profile(folder, lines, profile, recipe, fed=fed)
        else:  # steps are collective
            for _ in range(trace_steps):
                trial.step()
        shown = [*lines, *format_table(profile.entries, milliseconds=profile.milliseconds, rows=SHOWN)]
        say(trial.console, *shown, f"all files: {folder}")


def _summary(profile: StepProfile, experiment: Experiment, *, fed: float | None) -> list[str]:
    """Lines of plain text with the measurements; `fed` is milliseconds a step with the loader."""
    images = experiment.recipe.batch_size
    lines = [
        f"{experiment.recipe.name}, batch {images}, on {experiment.device}, {experiment.step.description}",
        f"step alone      {profile.milliseconds:.2f} ms, {rate(1e3 * images / profile.milliseconds)} source images/s; "
        f"the host is done after {profile.host_milliseconds:.2f} ms",
    ]
    if fed is not None:
        more = 100 * (fed / profile.milliseconds - 1)
        lines.append(f"with the loader {fed:.2f} ms, {rate(1e3 * images / fed)} source images/s ({more:+.1f} % time)")
    if profile.busy_milliseconds is not None and profile.busy_share is not None:
        lines.append(
            f"GPU busy        {profile.busy_milliseconds:.2f} ms, {100 * profile.busy_share:.1f} %, in "
            f"{profile.kernels:,.0f} kernels by {profile.launches:,.0f} launches"
        )
        lines.append(f"bottleneck      {profile.bottleneck()}")
    return lines


def _write_profile(folder: Path, lines: list[str], profile: StepProfile, recipe: Recipe, *, fed: float | None) -> None:
    """Write profile.txt and profile.json."""
    rows = format_table(profile.entries, milliseconds=profile.milliseconds, rows=WRITTEN)
    write_whole(folder / "profile.txt", "\n".join(map(visible, [*lines, "", *rows])) + "\n")
    numbers = asdict(profile) | {
        "busy_share": profile.busy_share,
        "fed_milliseconds": fed,
        "recipe": to_dict(recipe),
        "environment": environment(),
    }
    write_whole(folder / "profile.json", json.dumps(numbers, indent=2) + "\n")


@dataclass
class TrialRun:
    """A run that has been built.

    Attributes:
        experiment: its parts.
        console: where to report; quiet on all ranks but one.
        batches: of the run, in order, epoch after epoch.
        batch: the last one taken.
        taken: steps so far.
        seconds: duration of the last step, until the device had finished it.
    """

    experiment: Experiment
    console: Console
    batches: Iterator[ViewBatch]
    batch: ViewBatch
    taken: int = 0
    seconds: float = 0.0

    def step(self) -> StepOutput:
        """One update on the last batch. Steps beyond the run's end repeat its last one."""
        output = self.experiment.step(self.batch.views, min(self.taken, self.experiment.total_steps - 1))
        self.taken += 1
        return output

    def first_steps(self) -> list[float]:
        """Warm up, until all further steps are alike; losses of the first steps, which have batches of their own."""
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

    def fed_by_the_loader(self, steps: int) -> float | None:
        """Milliseconds a step on the loader's batches; None if the run has too few of them."""
        device, taken = self.experiment.device, 0
        began = time.perf_counter()
        for batch in islice(self.batches, PREPARED + steps):
            if taken == PREPARED:
                synchronize(device)
                began = time.perf_counter()
            self.batch = batch
            self.step()
            taken += 1
        synchronize(device)
        return 1e3 * (time.perf_counter() - began) / (taken - PREPARED) if taken > PREPARED else None


@contextmanager
def open_trial(
    recipe: Recipe, options: RunOptions, console: Console, *, check: Callable[[Console], None]
) -> Iterator[TrialRun]:
    """Build the whole run and take its first batch, after `check` has passed on rank 0."""
    device = resolve_device(options.device, local_rank=process_local_rank())
    with ExitStack() as stack:
        world = stack.enter_context(join_world(cuda=device.type == "cuda"))
        console = console if world.is_rank0 else Console(quiet=True)
        world.run_on_rank0(lambda: check(console))
        if options.resume:  # the run has its weights, which a trial does not need
            recipe = replace(recipe, backbone=replace(recipe.backbone, pretrained=None))
        recipe = resolve_pretrained(recipe, init_from=options.init_from)
        stack.enter_context(explain_out_of_memory(recipe, options, ranks=world.size))
        experiment = stack.enter_context(open_experiment(recipe, options, console, world))
        taken = init_from(experiment.step.online, experiment.step.target, recipe, options.init_from)
        if taken is not None:
            say(console, taken)
        if experiment.total_steps < FIRST:
            raise InputError(
                f"The whole run is {experiment.total_steps} step but must be {FIRST} or more to measure one: lower "
                "--batch-size or train for more epochs."
            )
        batches = chain.from_iterable(map(experiment.loader.epoch, range(recipe.epochs)))
        yield TrialRun(experiment=experiment, console=console, batches=batches, batch=next(batches))


def _on_gpu(device: torch.device) -> bool:
    """Whether launches can be counted; replaced by tests."""
    return device.type == "cuda"
