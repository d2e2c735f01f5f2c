"""The options that people use, for --help; --help-all shows all of them.

The table of all recipes that mvssl-train --list shows.

What the command line makes easier than the dataclasses do: errors name options, a short run has a short warm-up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mvssl.config.options import RunOptions
from mvssl.config.recipe import Backbone, Optimizer, Recipe
from mvssl.recipes import all_recipes
from mvssl.runs.folder import RunFolder
from pipelines.runtime import InputError
from pipelines.views.spec import ViewSpec, tasks

WIDTH = 120

CAPTION = """views: number of views per task, in the order of the recipe; (n) are targets without a task of their own
published: linear-probe top-1 on ImageNet-1k in arXiv 2602.05845; not reproduced with this code"""


def count_views(views: Sequence[ViewSpec]) -> str:
    """Views per task, e.g. "2+2+1" for two global, two local and one cutout view; target-only views in brackets."""
    counts = [str(sum(view.task == task for view in views)) for task in tasks(views)]
    only_targets = sum(view.task is None for view in views)
    return "+".join([*counts, f"({only_targets})"] if only_targets else counts)


def published(about: str) -> str:
    """The number in the `Published:` line of a recipe's docstring, with its unit; empty where there is none."""
    found = re.search(r"^\s*Published: ([\d.]+ %)", about, flags=re.MULTILINE)
    return found[1] if found else ""


def print_recipes(console: Console) -> None:
    """Show all recipes as a table of 120 columns at most, in full also where the terminal is narrower or a pipe."""
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for column in ("recipe", "method", "backbone", "views", "predictors", "batch", "epochs", "optimiser", "published"):
        table.add_column(
            column, no_wrap=True, justify="right" if column in ("batch", "epochs", "published") else "left"
        )
    for name, make in all_recipes().items():
        recipe = make()
        table.add_row(
            name,
            recipe.method,
            recipe.backbone.name,
            count_views(recipe.views),
            recipe.predictors,
            str(recipe.batch_size),
            str(recipe.epochs),
            recipe.optimizer.kind,
            published(make.__doc__ or ""),
        )
    wide = Console(file=console.file, width=WIDTH, highlight=False)
    wide.print(table)
    wide.print(CAPTION, markup=False)


_OPTIONS = {
    "Recipe": ("--",),
    "RunOptions": ("--",),
    "Optimizer": ("--optimizer.",),
    "Backbone": ("--backbone.",),
    "Evaluation": ("--evaluation.",),
    "DaliOptions": ("--dali.",),
    "Head": ("--projector.", "--predictor."),
    "ViewSpec": ("--views.N.",),
}
"""What stands before the field of each class on the command line."""


def with_option(message: str) -> str:
    """A message that begins with a field, such as Optimizer.base_lr, with the option that sets it."""
    found = re.match(r"(\w+)\.(\w+) ", message)
    if found is None or found[1] not in _OPTIONS:
        return message
    options = " or ".join(prefix + found[2].replace("_", "-") for prefix in _OPTIONS[found[1]])
    return f"{found[0][:-1]} ({options}){message[found.end() - 1 :]}"


def value_of(arguments: Sequence[str], option: str) -> str | None:
    """The value that a command line gives an option; None where it does not."""
    for place, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == option:
            return value if equals else next(iter(arguments[place + 1 : place + 2]), None)
    return None


def without_auto_batch(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """A command line without ``--batch-size auto``, and whether that was there."""
    words = list(arguments)
    for place, word in enumerate(words):
        name, _, value = word.partition("=")
        if name.replace("_", "-") != "--batch-size":
            continue
        if value == "auto":
            return words[:place] + words[place + 1 :], True
        if words[place + 1 : place + 2] == ["auto"]:
            return words[:place] + words[place + 2 :], True
    return words, False


def fit_warmup(recipe: Recipe, arguments: Sequence[str]) -> tuple[Recipe, str]:
    """Shorten the warm-up with the run, where --epochs is below the recipe's and --optimizer.warmup-epochs not given.

    A run that is resumed keeps the warm-up that it was begun with.

    Returns:
        The recipe, and a sentence that says what was changed; "" if nothing was.
    """
    epochs, out = value_of(arguments, "--epochs"), value_of(arguments, "--out")
    warmup = recipe.optimizer.warmup_epochs
    if epochs is None or not epochs.isdigit() or value_of(arguments, "--optimizer.warmup-epochs") is not None:
        return recipe, ""
    begun = None
    if "--resume" in arguments and out is not None:
        try:
            begun = RunFolder(Path(out)).recipe().optimizer.warmup_epochs
        except InputError:
            begun = None  # the run itself says what is wrong
    if begun is None and not 0 < int(epochs) < recipe.epochs:
        return recipe, ""
    shorter = begun if begun is not None else warmup * int(epochs) / recipe.epochs
    changed = replace(recipe, optimizer=replace(recipe.optimizer, warmup_epochs=min(shorter, recipe.epochs)))
    if begun is not None or shorter == warmup:
        return changed, ""
    return changed, (
        f"warm-up: {shorter:g} epochs instead of {warmup:g}, in proportion to the run "
        "(--optimizer.warmup-epochs sets it)"
    )


USED: tuple[tuple[str, tuple[tuple[type[Any], str], ...]], ...] = (
    ("data and place", ((RunOptions, "data"), (RunOptions, "out"), (RunOptions, "val"), (RunOptions, "cache"))),
    (
        "length and size",
        ((Recipe, "epochs"), (Recipe, "batch_size"), (Recipe, "accumulate"), (RunOptions, "time"), (Recipe, "seed")),
    ),
    (
        "what is trained",
        (
            (Backbone, "name"),
            (Recipe, "predictors"),
            (Optimizer, "base_lr"),
            (Optimizer, "weight_decay"),
            (Optimizer, "warmup_epochs"),
            (RunOptions, "init_from"),
        ),
    ),
    (
        "going on",
        ((RunOptions, "resume"), (RunOptions, "extend"), (RunOptions, "overwrite"), (RunOptions, "save_every_steps")),
    ),
    ("machine and reports", ((RunOptions, "device"), (RunOptions, "decoder"), (RunOptions, "log"))),
)
"""Options by what they are for."""

_PREFIX = {Backbone: "backbone.", Optimizer: "optimizer.", Recipe: "", RunOptions: ""}


def option(owner: type[Any], field: str) -> str:
    """How a field is written on the command line."""
    return f"--{_PREFIX[owner]}{field.replace('_', '-')}"


def describe(owner: type[Any], field: str) -> str:
    """The first sentence that the class says of its field."""
    text = re.search(rf"^ +{field}: (.+?)(?=^ +[\w, ]+: |\Z)", owner.__doc__ or "", flags=re.DOTALL | re.MULTILINE)
    words = " ".join((text[1] if text else "").split())
    ends = [found.start() for found in re.finditer(r"(?<!e\.g)[.;:] |\.$", words)]
    whole = [at for at in ends if words[:at].count("(") == words[:at].count(")")]
    return words[: whole[0]] if whole else words


def print_short_help(console: Console, recipe: Recipe, name: str) -> None:
    """Print the options that people use, with their values in this recipe."""
    held = {Recipe: recipe, Backbone: recipe.backbone, Optimizer: recipe.optimizer, RunOptions: RunOptions()}
    console.print(f"usage: mvssl-train {name} --data PATH --out RUN [options]\n", highlight=False, markup=False)
    for title, options in USED:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
        for owner, field in options:
            assert field in {known.name for known in fields(owner)}
            value = getattr(held[owner], field)
            shown = "" if value is None or value is False else f" [{_plain(value)}]"
            table.add_row(f"  {option(owner, field)}", describe(owner, field) + shown)
        console.print(table, markup=False)
        console.print()
    console.print(
        "  --dry-run        build everything, run a few steps, report memory and speed; leave nothing\n"
        "  --print-config   print the resolved recipe as JSON\n"
        "  --help-all       every option: views, heads, schedules, DALI, what is logged and saved",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_plain, value))
    return str(value) if not isinstance(value, float | Path) else f"{value}"
