"""Command lines of the benchmarks: checks of arguments, a recipe's fields as options, and the finished result."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.harness.results import write_result
from mvssl.config.recipe import Recipe
from mvssl.recipes.files import resolve_recipe
from pipelines.runtime import InputError, invalid, parse_arguments

Arguments = TypeVar("Arguments")
DEFAULT_RECIPE = "byol_resnet50_200ep"


def check_positive(arguments: object, *names: str) -> None:
    """Refuse fields below 1; of a tuple its smallest value counts, and None is no value."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            raise invalid(name, value, "1 or more", "give a larger number")


def check_device(device: str) -> None:
    """Refuse CUDA where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda but torch finds no CUDA device here: take --device cpu.")


def parse_with_recipe(
    kind: type[Arguments], words: Sequence[str], *, prog: str, default: Callable[[Recipe], Arguments]
) -> Arguments:
    """Parse a command line whose --recipe gives the defaults of the recipe's fields, which are options too.

    Args:
        kind: the dataclass of all arguments.
        words: of the command line.
        prog: how the command is called.
        default: the arguments with this recipe.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--recipe", default=DEFAULT_RECIPE)
    chosen, rest = chooser.parse_known_args(words)
    return parse_arguments(kind, prog=prog, args=rest, default=default(resolve_recipe(chosen.recipe)))


def command_of(prog: str, words: Sequence[str]) -> str:
    """The command that repeats a measurement, without paths of this machine and without --out."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--out":
            next(rest, None)
        elif not word.startswith("--out="):
            is_path = word.startswith(("/", ".", "~")) or ("/" in word and Path(word).exists())
            kept.append(Path(word).name if is_path else word)
    return f"{prog} {shlex.join(kept)}".strip()


def finish(result: Mapping[str, Any], out: Path | None, *, failed: bool = False) -> int:
    """Print a result, write it if `out` is given, and return the exit code: 1 if something failed."""
    print(json.dumps(result, indent=2))
    write_result(out, result)
    return int(failed)
