"""What the benchmarks' command lines share: a recipe whose fields are options, the command that is told, the file."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from mvssl.config.recipe import Recipe
from mvssl.recipes.files import resolve_recipe

Arguments = TypeVar("Arguments")
DEFAULT_RECIPE = "byol_resnet50_200ep"


def parse_with_recipe(
    kind: type[Arguments], words: Sequence[str], *, prog: str, default: Callable[[Recipe], Arguments]
) -> Arguments:
    """Parse a command line whose --recipe gives the defaults of the recipe's fields, which are options too.

    Args:
        kind: the dataclass of all arguments.
        words: of the command line.
        prog: how the command is called.
        default: the arguments with this recipe.

    Raises:
        InputError: there is no such recipe, or a value cannot be used.
        SystemExit: with code 2 for wrong usage, 0 after printing help.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--recipe", default=DEFAULT_RECIPE)
    chosen, rest = chooser.parse_known_args(words)
    return tyro.cli(kind, prog=prog, args=rest, default=default(resolve_recipe(chosen.recipe)))


def command_of(prog: str, words: Sequence[str]) -> str:
    """The command that repeats a measurement, without paths of this machine and without --out."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--out":
            next(rest, None)
        elif not word.startswith("--out="):
            kept.append(Path(word).name if "/" in word else word)
    return f"{prog} {shlex.join(kept)}".strip()


def finish(result: Mapping[str, Any], out: Path | None, *, failed: bool) -> int:
    """Print a result, write it where that is wanted, and give the exit code: 1 if something failed."""
    print(json.dumps(result, indent=2))
    write_result(out, result)
    return int(failed)


def write_result(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON where one is wanted; a reader, or a kill, finds the old file or the new one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(aside, path)
