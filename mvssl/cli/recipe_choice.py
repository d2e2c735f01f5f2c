"""Which recipe mvssl-train takes, and how it is fitted to the images: what is decided before the full parser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from mvssl.config.recipe import Recipe
from mvssl.config.serialize import flatten
from mvssl.ranks import process_local_rank
from mvssl.recipes import DEFAULT, all_recipes
from mvssl.recipes.files import is_recipe_file
from pipelines.progress import Progress
from pipelines.runtime import InputError
from pipelines.storage.remote_files import RemoteOptions

_FLAGS = ("--resume", "--overwrite", "--extend", "--dry-run", "--print-config")


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the default recipe in front if none is named.

    Raises:
        InputError: a recipe is named behind options.
    """
    if not names_no_recipe(arguments):
        return list(arguments)
    for before, word in pairwise(arguments):
        is_value = before.startswith("-") and "=" not in before and before not in _FLAGS
        if not is_value and (word in all_recipes() or is_recipe_file(word)):
            raise InputError(
                f"recipe is missing: the recipe comes first, then {arguments[0]!r} and other options; write {word!r} "
                "in front of them, as in mvssl-train RECIPE --data PATH --out RUN."
            )
    return [DEFAULT, *arguments]


def names_no_recipe(arguments: Sequence[str]) -> bool:
    """Whether the arguments begin with an option."""
    return bool(arguments) and arguments[0].startswith("-")


def given_fields(arguments: Sequence[str]) -> dict[str, str]:
    """The options among arguments, by dotted field such as optimizer.kind, with the first word of their values."""
    given = {}
    for number, word in enumerate(arguments):
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            after = "".join(arguments[number + 1 : number + 2])
            given[name.replace("-", "_")] = value if has_value else "true" if after.startswith("--") else after
    return given


class CommandFit:
    """Fits a recipe to the images that a command names; see `mvssl.training.fit_recipe`.

    Attributes:
        notes: lines for the log on what was chosen.
    """

    def __init__(self, arguments: Sequence[str], *, default: bool, resumes: Path | None) -> None:
        """`arguments` behind the recipe; `default`: none was named; `resumes`: the run folder that is resumed."""
        self.notes: tuple[str, ...] = ()
        self._given, self._default, self._resumes = given_fields(arguments), default, resumes

    def __call__(self, recipe: Recipe, of_file: Mapping[str, Any]) -> Recipe:
        """The recipe fitted; `of_file` are the fields that a recipe file overrides."""
        from mvssl.training.fit_recipe import fit_recipe

        data, given = self._given.get("data"), dict(flatten(of_file)) | self._given
        progress = Progress(Console(stderr=True, quiet=bool(process_local_rank())), f"indexing {data}")
        cache, size = self._given.get("remote.cache"), self._given.get("remote.cache_size")
        fitted, notes = fit_recipe(
            recipe,
            given,
            data=Path(data) if data else None,
            device=self._given.get("device", "auto"),
            resumes=self._resumes,
            default=self._default,
            progress=progress.update,
            remote=RemoteOptions(cache=Path(cache) if cache else None, cache_size=size or RemoteOptions.cache_size),
        )
        if self._default and self._resumes is None:
            notes = (f"no recipe is named: {recipe.name} is taken (mvssl-train --list has the others)", *notes)
        self.notes = notes
        return fitted
