"""The options that people use, for --help; --help-all shows all of them."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mvssl.recipe import Backbone, Optimizer, Recipe
from mvssl.runs.options import RunOptions

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
