"""mvssl-train: pre-train a backbone.

mvssl-train report: one page about a run.

Commands that torchrun may start several times: what goes wrong is said once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from mvssl.cli.doctor import doctor
from mvssl.cli.help import fit_warmup, print_recipes, print_short_help, with_option, without_auto_batch
from mvssl.config.options import RunOptions, resolve_device
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.distributed import OtherRankFailed, process_local_rank, process_rank, rank_count
from mvssl.monitor.report import write_report
from mvssl.recipes import all_recipes
from mvssl.recipes.files import is_recipe_file, resolve_recipe
from mvssl.runs.folder import RunFolder
from mvssl.training.memory import with_largest_batch
from mvssl.training.monitor import Diverged
from mvssl.training.preflight import dry_run, profile_run
from mvssl.training.run import run
from mvssl.training.shutdown import EXIT_INTERRUPTED, Interrupted, requeue
from pipelines.runtime import EXIT_ERROR, InputError, invalid, run_cli
from pipelines.storage import open_source, split_paths


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Write one self-contained HTML page about a run, finished or not.

    Attributes:
        run: the run folder.
        out: the page; by default RUN/report.html, which is written anew.
    """

    run: tyro.conf.Positional[Path]
    out: Path | None = None


def report(arguments: Sequence[str], console: Console) -> int:
    """Run the command; returns the exit code."""
    asked = tyro.cli(ReportArguments, prog="mvssl-train report", args=list(arguments))
    folder = RunFolder(asked.run)
    out = asked.out or folder.report
    if asked.out is not None and asked.out.suffix != ".html":
        raise InputError(f"out is {str(asked.out)!r} but must end in .html: the page is of that kind.")
    write_report(out, folder)
    console.print(f"Report: {out}", highlight=False, markup=False, soft_wrap=True)
    return 0


def main_speaks(work: Callable[[], None]) -> int:
    """Do the work of a command on this rank; returns the exit code.

    Raises:
        InputError: it failed; ranks other than 0 say which they are.
    """
    try:
        work()
    except OtherRankFailed as failure:
        if process_rank() == 0:
            print(f"error: {failure}", file=sys.stderr)
        return EXIT_ERROR
    except InputError as error:
        if process_rank() == 0:
            raise
        raise InputError(f"on rank {process_rank()}: {error}") from error
    return 0


USAGE = """usage: mvssl-train RECIPE --data PATH --out RUN [overrides]

  mvssl-train --list             the recipes
  mvssl-train doctor             what of this machine a run can use
  mvssl-train report RUN         one page about a run
  mvssl-train RECIPE --help      the options that people use, with their values in this recipe
  mvssl-train RECIPE --help-all  every field that can be overridden

RECIPE is the name of a recipe, or a .toml or .json file with one.

exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 75 stopped by SIGINT or SIGTERM after saving
(run the same command with --resume), 130 stopped by Ctrl-C before training or by a second Ctrl-C."""


COMMANDS = {"doctor": doctor, "report": report}


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Pre-train a backbone.

    Attributes:
        recipe: what decides the numbers.
        options: where to read and write, and how to report.
        print_config: print the resolved recipe as JSON and stop.
        dry_run: build everything, run a few steps, report memory, images/s and, on a GPU, launches and the bottleneck;
            leave nothing.
        profile: train nothing, but measure this many steps: what takes their time, as a table and a trace in the
            folder --out.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    options: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)
    print_config: bool = False
    dry_run: bool = False
    profile: int | None = None

    def __post_init__(self) -> None:
        if self.profile is not None and self.profile < 1:
            raise invalid("profile", self.profile, "1 or more", "give a number of steps")
        if self.profile is not None and self.dry_run:
            raise InputError("dry_run and profile exclude each other: give one of --dry-run and --profile.")


def parse(arguments: Sequence[str]) -> TrainArguments:
    """Parse ``RECIPE [overrides]``, where RECIPE is a name or a recipe file.

    Raises:
        InputError: there is no such recipe, its file cannot be used, or a value cannot.
        SystemExit: with code 2 for wrong usage, 0 after printing help.
    """
    recipe, said = fit_warmup(resolve_recipe(arguments[0]), arguments[1:])
    arguments, automatic = without_auto_batch(arguments)
    from_file = is_recipe_file(arguments[0])
    words = ["--help" if word == "--help-all" else word for word in arguments[1:]]
    try:
        parsed = tyro.cli(
            TrainArguments,
            prog=f"mvssl-train {arguments[0]}",
            description=f"The recipe in {arguments[0]}." if from_file else all_recipes()[recipe.name].__doc__,
            args=words,
            default=TrainArguments(recipe=recipe),
        )
    except InputError as error:
        raise InputError(with_option(str(error))) from error
    if automatic:
        fitted, told = _largest_batch(parsed)
        parsed, said = replace(parsed, recipe=fitted), "\n".join(filter(None, (said, told)))
    if said:
        print(said, file=sys.stderr)
    return parsed


def _largest_batch(parsed: TrainArguments) -> tuple[Recipe, str]:
    """The recipe with the largest batch for this GPU; a resumed run keeps the one that it was begun with."""
    options = parsed.options
    if options.resume and options.out is not None:
        begun = RunFolder(options.out).recipe().batch_size
        return replace(parsed.recipe, batch_size=begun), f"batch size: {begun}, as the run was begun"
    device = resolve_device(options.device, local_rank=process_local_rank())
    if options.data is None:
        raise InputError("data is missing: give the folder of images, or a converted data set, with --data PATH.")
    images = len(open_source(split_paths(options.data)[0]))
    return with_largest_batch(
        parsed.recipe, device, processes=rank_count(), images=images, cuda_graph=options.cuda_graph
    )


@contextmanager
def _heard_once() -> Iterator[None]:
    """Let the first process of a machine alone speak: what is wrong with a command is wrong for all of them."""
    with ExitStack() as stack:
        if process_local_rank():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def body(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console = Console()
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(USAGE, highlight=False, markup=False, soft_wrap=True)
        print_recipes(console)
        return 0 if arguments else 2
    if arguments[0] == "--list":
        print_recipes(console)
        return 0
    if arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:], console)
    if {"-h", "--help"} & set(arguments):
        print_short_help(console, resolve_recipe(arguments[0]), arguments[0])
        return 0
    try:
        with _heard_once():
            parsed = parse(arguments)
    except InputError:
        if process_local_rank():
            return EXIT_ERROR
        raise
    if parsed.print_config:
        print(json.dumps(to_dict(parsed.recipe), indent=2))
        return 0
    rank = process_rank()
    try:
        if parsed.dry_run:
            dry_run(parsed.recipe, parsed.options, console)
        elif parsed.profile is not None:
            profile_run(parsed.recipe, parsed.options, console, steps=parsed.profile)
        else:
            run(parsed.recipe, parsed.options, console=console)
    except Interrupted as stopped:
        if rank == 0:
            console.print(str(stopped), highlight=False, markup=False, soft_wrap=True)
            queued = requeue(stopped.stopped_by)
            if queued is not None:
                console.print(queued, highlight=False, markup=False, soft_wrap=True)
        return EXIT_INTERRUPTED
    except OtherRankFailed as failure:
        if rank == 0:
            print(f"error: {failure}", file=sys.stderr)
        return EXIT_ERROR
    except Diverged:
        if rank == 0:
            raise
        return EXIT_ERROR
    except InputError as error:
        if rank == 0:
            raise
        raise InputError(f"on rank {rank}: {error}") from error
    return 0


def main() -> None:
    """Console script."""
    sys.exit(run_cli(lambda: body(sys.argv[1:])))


if __name__ == "__main__":
    main()
