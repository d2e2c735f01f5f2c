"""Help of mvssl-train: the table of recipes, the short help, and options in error messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.recipes import PUBLISHED, all_recipes
from pipelines.names import cell, say, say_table
from pipelines.runtime import InputError
from pipelines.views.spec import ViewSpec, sizes_by_task, tasks

WIDTH = 120

CAPTION = """views: number of views per task, in the order of the recipe; (n) are target-only views; pixels: their edge
published: linear-probe top-1 on ImageNet-1k in arXiv 2602.05845; not reproduced with this code;
74.5 and 78.3 % of the ViTs are of the target network (mvssl-eval --network target)"""


def print_recipes(console: Console) -> None:
    """Print all recipes as a table of at most 120 columns, also to a narrower terminal or a pipe."""
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    names = "recipe method backbone views pixels predictors batch epochs optim. published"
    for column in names.split():
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
            size_views(recipe.views),
            recipe.predictors,
            str(recipe.batch_size),
            str(recipe.epochs),
            recipe.optimizer.kind,
            f"{PUBLISHED[name]:g} %" if name in PUBLISHED else "",
        )
    wide = Console(file=console.file, width=WIDTH, highlight=False)
    say_table(wide, table)
    say(wide, *CAPTION.split("\n"))


def count_views(views: Sequence[ViewSpec]) -> str:
    """Views per task, e.g. "2+2+1" for two global, two local and one cutout view; target-only views in brackets."""
    counts = [str(sum(view.task == task for view in views)) for task in tasks(views)]
    only_targets = sum(view.task is None for view in views)
    return "+".join([*counts, f"({only_targets})"] if only_targets else counts)


def size_views(views: Sequence[ViewSpec]) -> str:
    """Edge in pixels of each task's views, in the order of `count_views`, e.g. "224+96+224"."""
    return "+".join(f"({size})" if task is None else size for task, size in sizes_by_task(views).items())


class CommonOption(NamedTuple):
    """An option of the short help.

    Attributes:
        path: of its field in `TrainArguments`, e.g. "recipe.optimizer.base_lr".
        about: what it does.
    """

    path: str
    about: str

    @property
    def option(self) -> str:
        """The option on the command line."""
        return f"--{self.path.partition('.')[2].replace('_', '-')}"


COMMON: dict[str, tuple[CommonOption, ...]] = {
    "data and output": (
        CommonOption("options.data", "folder of images, list of files, tars, Parquet, or converted data"),
        CommonOption("options.out", "run folder"),
        CommonOption("options.val", "labelled images for the online kNN; by default DATA/val if it exists"),
        CommonOption("options.cache", "pixel cache: off, host, device or auto"),
    ),
    "length and size": (
        CommonOption("recipe.epochs", "passes over the data set"),
        CommonOption("recipe.batch_size", "images per step over all ranks, or auto on a GPU"),
        CommonOption("recipe.accumulate", "gradient-accumulation micro-batches per rank"),
        CommonOption("options.time", "save and stop before this much time is over, such as 7h30m"),
        CommonOption("recipe.seed", "of order, augmentation parameters and initial weights"),
    ),
    "model and optimiser": (
        CommonOption("recipe.backbone.name", "timm's name of the architecture"),
        CommonOption("recipe.backbone.pretrained", "known weights: true, a tag or name of timm, local-dir:FOLDER"),
        CommonOption("recipe.predictors", "per-view: one per task; shared: one for all"),
        CommonOption("recipe.optimizer.base_lr", "learning rate for a batch of 256"),
        CommonOption("recipe.optimizer.weight_decay", "weight decay"),
        CommonOption("recipe.optimizer.warmup_epochs", "epochs of linear warm-up"),
        CommonOption("options.init_from", "checkpoint or exported backbone to initialise from"),
    ),
    "saving and resuming": (
        CommonOption("options.resume", "resume the run in --out from its last checkpoint"),
        CommonOption(
            "options.extend", "with --resume and a larger --epochs (of the whole run): train beyond the planned end"
        ),
        CommonOption("options.overwrite", "delete the run in --out first"),
        CommonOption("options.save_every_steps", "steps between two checkpoints, in addition to those by epoch"),
    ),
    "machine and logging": (
        CommonOption("options.device", "auto takes CUDA if available"),
        CommonOption("options.devices", "several GPUs: their number, 0,1,3 or all; with --device cpu processes"),
        CommonOption("options.checkpointing", "compute activations again in the backward, for less memory"),
        CommonOption("options.decoder", "auto takes DALI if it is installed"),
        CommonOption("options.log", "loggers besides metrics.jsonl: any of tensorboard csv wandb mlflow, or none"),
    ),
}
"""The options of the short help, by purpose."""


def print_short_help(console: Console, recipe: Recipe, name: str) -> None:
    """Print the common options with their values in this recipe."""
    say(console, f"usage: mvssl-train {name} --data PATH --out RUN [options]", "")
    values = {"recipe": recipe, "options": RunOptions()}
    for title, options in COMMON.items():
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
        for common in options:
            owner, *rest = common.path.split(".")
            value: Any = values[owner]
            for part in rest:
                value = getattr(value, part)
            shown = "" if value is None or value is False else f" [{_plain(value)}]"
            table.add_row(cell(f"  {common.option}"), cell(common.about + shown))
        say_table(console, table)
        say(console, "")
    say(
        console,
        "  --dry-run        build everything, run a few steps, report memory and speed; write nothing",
        "  --print-config   print the resolved recipe as JSON",
        "  --view-preset    microscopy, aerial, astronomy, radiology or documents: adapt the views to such pictures",
        "  --help-all       every option: views, heads, schedules, DALI, logging and saving",
    )


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


_PREFIXES = {
    "Recipe": ("--",),
    "RunOptions": ("--",),
    "Execution": ("--",),
    "Optimizer": ("--optimizer.",),
    "Backbone": ("--backbone.",),
    "Evaluation": ("--evaluation.",),
    "DaliOptions": ("--dali.",),
    "Head": ("--projector.", "--predictor."),
    "ViewSpec": ("--views.N.",),
}
"""Prefix of each class's fields on the command line."""


def with_option(error: InputError) -> InputError:
    """The error, with the option that sets its field."""
    owner, _, name = (error.field or "").rpartition(".")
    prefixes = _PREFIXES.get(owner.partition("(")[0])
    if error.field is None or prefixes is None or not str(error).startswith(error.field):
        return error
    options = " or ".join(prefix + name.replace("_", "-") for prefix in prefixes)
    return InputError(f"{error.field} ({options}){str(error)[len(error.field) :]}", field=error.field)
