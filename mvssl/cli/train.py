"""mvssl-train: pre-train a backbone, check the machine, or write a report.

What imports torch, which takes seconds, is imported by the functions that need it: help and lists do not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from mvssl.cli.doctor import doctor
from mvssl.cli.help import print_recipes, print_short_help, with_option
from mvssl.cli.launch import launch, wants_launch
from mvssl.cli.recipe_choice import CommandFit, names_no_recipe, with_recipe
from mvssl.config.options import Execution, RunOptions
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import EXECUTION, to_dict
from mvssl.ranks import exit_code_of_rank, process_local_rank, process_rank, rank_count
from mvssl.recipes import all_recipes
from mvssl.recipes.files import is_recipe_file, resolve_recipe, resolve_with_options, with_view_preset
from pipelines.names import say, visible
from pipelines.runtime import EXIT_ERROR, InputError, invalid, parse_arguments, run_cli
from pipelines.storage import open_source, split_paths

USAGE = """usage: mvssl-train [RECIPE] --data PATH --out RUN [overrides]

  mvssl-train --list             the recipes
  mvssl-train doctor             checks GPU, decoders, compiler and disk, with fixes
  mvssl-train runs FOLDER        the runs below a folder: epochs, loss, kNN, speed, state
  mvssl-train report RUN [RUN]   one page about a run, or about several side by side
  mvssl-train RECIPE --help      the common options, with their values in this recipe
  mvssl-train RECIPE --help-all  every field that can be overridden

RECIPE is the name of a recipe, or a .toml or .json recipe file; photos, fitted to your images, if none is named.

exit codes: 0 done, 1 an error that the message explains (also a loss that is NaN, or collapsed embeddings), 2 wrong
usage, 75 stopped by SIGINT, SIGTERM or SIGHUP after saving (run the same command with --resume), 130 stopped by Ctrl-C
before training or by a second Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Pre-train a backbone.

    Attributes:
        recipe: what determines the numbers.
        options: data, output, logging and saving.
        print_config: print the resolved recipe as JSON and stop.
        dry_run: build everything, run a few steps, report memory, images/s and the time of the whole run, on a GPU
            launches and the bottleneck too; write nothing.
        profile: measure this many steps without training: a table of times, and a trace in the folder --out.
        view_preset: adapt the recipe's views to other pictures than photographs: microscopy, aerial, astronomy,
            radiology or documents; --views.N options still override it.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    options: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)
    print_config: bool = False
    dry_run: bool = False
    profile: int | None = None
    view_preset: str | None = None

    def __post_init__(self) -> None:
        if self.profile is not None and self.profile < 1:
            raise invalid("profile", self.profile, "1 or more", "give a number of steps")
        if self.profile is not None and self.dry_run:
            raise InputError("dry_run and profile exclude each other: give one of --dry-run and --profile.")


def body(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console = Console()
    if not arguments or arguments[0] in ("-h", "--help"):
        say(console, *USAGE.split("\n"))
        print_recipes(console)
        return 0 if arguments else 2
    if arguments[0] == "--list":
        print_recipes(console)
        return 0
    if arguments[0] in SUBCOMMANDS:
        return SUBCOMMANDS[arguments[0]](arguments[1:], console)
    named = with_recipe(arguments)
    if look_ahead(named[1:]).short_help:
        print_short_help(console, resolve_recipe(named[0]), named[0])
        return 0
    try:
        with _silent_unless_first_on_host():
            parsed, notes = parse_with_notes(arguments)
            launches = not parsed.print_config and wants_launch(parsed.options)
    except InputError:
        if process_local_rank():
            return EXIT_ERROR
        raise
    if launches:
        return launch(parsed.options, arguments)
    trains = not (parsed.print_config or parsed.dry_run or parsed.profile is not None)
    if not trains and not process_local_rank():
        print_notes(notes)
    if parsed.print_config:
        print(json.dumps(to_dict(parsed.recipe) | _given_execution(parsed.options), indent=2))
        return 0
    return exit_code_of_rank(lambda: _train(parsed, notes, console))


def _given_execution(options: RunOptions) -> dict[str, Any]:
    """The options that a recipe file may hold, where they are not the default."""
    values = {name: getattr(options, name) for name in EXECUTION}
    return {name: value for name, value in values.items() if value != getattr(Execution(), name)}


@contextmanager
def _silent_unless_first_on_host() -> Iterator[None]:
    """Print from the first process of a host only: all have the same arguments, and so the same errors."""
    with ExitStack() as stack:
        if process_local_rank():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def _train(parsed: TrainArguments, notes: Sequence[str], console: Console) -> int:
    """Train, profile or do a dry run; returns the exit code."""
    with _while_loading(console):
        from mvssl.monitor.collapse import Collapsed
        from mvssl.training.monitor import Diverged
        from mvssl.training.preflight import dry_run, profile_run
        from mvssl.training.run import run
        from mvssl.training.shutdown import EXIT_INTERRUPTED, Interrupted, requeue

    try:
        if parsed.dry_run:
            dry_run(parsed.recipe, parsed.options, console)
        elif parsed.profile is not None:
            profile_run(parsed.recipe, parsed.options, console, steps=parsed.profile)
        else:
            run(parsed.recipe, parsed.options, console=console, notes=notes)
    except Interrupted as stopped:
        if process_rank() == 0:
            say(console, *filter(None, (str(stopped), requeue(stopped.stopped_by))))
        return EXIT_INTERRUPTED
    except (Diverged, Collapsed):
        if process_rank() == 0:
            raise
        return EXIT_ERROR
    return 0


def _while_loading(console: Console) -> AbstractContextManager[object]:
    """A sign of life in a terminal for the seconds that importing PyTorch takes; it vanishes afterwards."""
    quiet = not console.is_terminal or process_local_rank() or "torch" in sys.modules
    return nullcontext() if quiet else console.status("loading PyTorch")


def parse(arguments: Sequence[str]) -> TrainArguments:
    """As `parse_with_notes`, which are printed to stderr."""
    parsed, notes = parse_with_notes(arguments)
    print_notes(notes)
    return parsed


def print_notes(notes: Sequence[str]) -> None:
    """Print notes to stderr."""
    for note in notes:
        print(visible(note), file=sys.stderr)


def parse_with_notes(arguments: Sequence[str]) -> tuple[TrainArguments, tuple[str, ...]]:
    """Parse `[RECIPE] [overrides]`, where RECIPE is a name or a recipe file; with notes on what was chosen.

    Raises:
        InputError: the recipe does not exist, its file cannot be read, or a value is not allowed.
        SystemExit: with code 2 for wrong usage, 0 after printing help.
    """
    default, arguments = names_no_recipe(arguments), with_recipe(arguments)
    ahead = look_ahead(arguments[1:])
    fit = CommandFit(ahead.rest, default=default, resumes=ahead.resumes)
    recipe, given = resolve_with_options(arguments[0], fit=fit)
    recipe = with_view_preset(recipe, ahead.view_preset)
    recipe, note = fit_warmup(recipe, ahead)
    from_file = is_recipe_file(arguments[0])
    try:
        parsed = parse_arguments(
            TrainArguments,
            prog=f"mvssl-train {arguments[0]}",
            description=f"The recipe in {arguments[0]}." if from_file else all_recipes()[arguments[0]].__doc__,
            args=ahead.rest,
            default=TrainArguments(recipe=recipe, options=RunOptions(**given)),
        )
    except InputError as error:
        raise with_option(error) from error
    if ahead.automatic_batch and not wants_launch(parsed.options):
        fitted, batch_note = _largest_batch(parsed)
        parsed, note = replace(parsed, recipe=fitted), "\n".join(filter(None, (note, batch_note)))
    return parsed, (*fit.notes, *filter(None, note.split("\n")))


@dataclass(frozen=True, kw_only=True)
class LookAhead:
    """Options that decide which help is shown or what the defaults are, and so are read before all others.

    Attributes:
        short_help: whether the short help is asked for.
        epochs: --epochs, if given.
        warmup: whether --optimizer.warmup-epochs is given.
        resumes: run folder that is resumed, if any.
        automatic_batch: whether the batch size is auto.
        view_preset: --view-preset, if given.
        rest: arguments for the full parser.
    """

    short_help: bool = False
    epochs: int | None = None
    warmup: bool = False
    resumes: Path | None = None
    automatic_batch: bool = False
    view_preset: str | None = None
    rest: tuple[str, ...] = ()


def look_ahead(arguments: Sequence[str]) -> LookAhead:
    """Read the few options that must be known before the full parser, which takes the others and reports errors.

    A shorter run has a shorter warm-up by default, and a view preset other views; `--batch-size auto` and `--help-all`
    are no fields.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", dest="short_help", action="store_true")
    parser.add_argument("--help-all", dest="full_help", action="store_true")
    parser.add_argument("--epochs", nargs="?")
    parser.add_argument("--optimizer.warmup-epochs", "--optimizer.warmup_epochs", dest="warmup", nargs="?", const="")
    parser.add_argument("--batch-size", "--batch_size", dest="batch_size", nargs="?")
    parser.add_argument("--view-preset", "--view_preset", dest="view_preset", nargs="?")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    parser.add_argument("--out", type=Path, nargs="?")
    try:
        known, _ = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError:  # such as --resume=1, which the full parser reports
        return LookAhead(rest=tuple(arguments))
    automatic = known.batch_size == "auto"
    rest = ["--help"] if known.full_help else list(arguments)
    if automatic:  # the full parser takes a number only
        batch = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        batch.add_argument("--batch-size", "--batch_size")
        rest = batch.parse_known_args(rest)[1]
    return LookAhead(
        short_help=known.short_help,
        epochs=int(known.epochs) if (known.epochs or "").isdecimal() else None,
        warmup=known.warmup is not None,
        resumes=known.out if known.resume else None,
        automatic_batch=automatic,
        view_preset=None if known.view_preset == "None" else known.view_preset,
        rest=tuple(rest),
    )


def fit_warmup(recipe: Recipe, ahead: LookAhead) -> tuple[Recipe, str]:
    """Shorten the warm-up in proportion to a shorter run, unless it is given; a resumed run keeps its warm-up.

    Returns:
        The recipe, and a note on what was changed; "" if nothing was.
    """
    if ahead.epochs is None or ahead.warmup:
        return recipe, ""
    from mvssl.training import arguments as arguments_of_run

    recipe, note = arguments_of_run.fit_warmup(recipe, ahead.epochs, resumes=ahead.resumes)
    return recipe, f"{note} (--optimizer.warmup-epochs sets it)" if note else ""


def _largest_batch(parsed: TrainArguments) -> tuple[Recipe, str]:
    """The recipe with the largest batch for this GPU; a resumed run keeps its batch."""
    from mvssl.config.device import resolve_device
    from mvssl.runs.folder import RunFolder
    from mvssl.training.memory import with_largest_batch

    options = parsed.options
    if options.resume and options.out is not None:
        earlier = RunFolder(options.out).recipe().batch_size
        return replace(parsed.recipe, batch_size=earlier), f"batch size: {earlier}, that of the resumed run"
    device = resolve_device(options.device, local_rank=process_local_rank())
    if options.data is None:
        raise InputError(
            "data is missing: give the folder of images, tars, Parquet, or a converted data set, with --data PATH."
        )
    images = len(open_source(split_paths(options.data, remote=options.remote)[0], remote=options.remote))
    return with_largest_batch(parsed.recipe, options, device, processes=rank_count(), images=images)


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Write one self-contained HTML page about a run, finished or not, or one that compares several.

    Attributes:
        runs: the run folder; or several, or a folder with runs in it, or patterns such as 'runs/byol*'.
        out: the page; by default RUN/report.html of a single run, and compare.html here of several. It is overwritten.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path | None = None

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("runs is missing: give a run folder, several, or a folder with runs in it.")


def report(arguments: Sequence[str], console: Console) -> int:
    """Run the command; returns the exit code."""
    asked = parse_arguments(ReportArguments, prog="mvssl-train report", args=arguments)
    from mvssl.cli.runs import notes_on
    from mvssl.monitor.comparison import write_comparison
    from mvssl.monitor.report import write_report
    from mvssl.runs.folder import RunFolder
    from mvssl.runs.listing import named_runs

    if asked.out is not None and asked.out.suffix != ".html":
        raise InputError(f"out is {str(asked.out)!r} but must end in .html: rename it.")
    paths, left_out = named_runs(asked.runs)
    print_notes(notes_on(left_out, "left out"))
    folders = [RunFolder(path) for path in paths]
    if len(folders) == 1:
        out = asked.out or folders[0].report
        write_report(out, folders[0])
    else:
        out = asked.out or Path("compare.html")
        write_comparison(out, folders)
    say(console, f"Report: {out}")
    return 0


def runs(arguments: Sequence[str], console: Console) -> int:
    """Run the command; returns the exit code."""
    from mvssl.cli.runs import runs as list_runs

    return list_runs(arguments, console)


SUBCOMMANDS: dict[str, Callable[[Sequence[str], Console], int]] = {"doctor": doctor, "report": report, "runs": runs}


def main() -> None:
    """Console script."""
    sys.exit(run_cli(lambda: body(sys.argv[1:])))


if __name__ == "__main__":
    main()
