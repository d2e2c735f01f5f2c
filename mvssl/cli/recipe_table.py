"""The table of all recipes that mvssl-train --list shows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mvssl.recipes import all_recipes
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
