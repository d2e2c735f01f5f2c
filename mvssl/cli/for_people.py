"""What the command line makes easier than the dataclasses do: errors name options, a short run has a short warm-up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mvssl.recipe import Recipe
from mvssl.runs.folder import RunFolder
from pipelines.errors import InputError

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
