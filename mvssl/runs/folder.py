"""The folder of a run: what lies where, and how one is begun, refused, overwritten or resumed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mvssl.config.recipe import Recipe
from mvssl.config.serialize import differences, from_dict, to_dict
from mvssl.runs.environment import environment
from pipelines.runtime import InputError, invalid


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary name and rename, so that readers never see half a file."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)


class RunFolder:
    """Paths of a run's files.

    config.json, environment.json, metrics.jsonl (what the recipe decides: the same bytes on every repetition),
    throughput.jsonl (what the machine decides), train.log, tensorboard/, csv/, wandb/, checkpoints/, report.html,
    backbone.safetensors,
    views.png, losses.png, failure.json where a run diverged, and eval/ from mvssl-eval.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.throughput = path / "throughput.jsonl"
        self.log = path / "train.log"
        self.tensorboard = path / "tensorboard"
        self.csv = path / "csv"
        self.wandb = path / "wandb"
        self.report = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last"
        self.backbone = path / "backbone.safetensors"
        self.views = path / "views.png"
        self.losses = path / "losses.png"
        self.failure = path / "failure.json"
        self.evaluations = path / "eval"

    def recipe(self) -> Recipe:
        """The recipe the run was begun with.

        Raises:
            InputError: this is no run folder, or its config.json is damaged.
        """
        return from_dict(self._config()["recipe"])

    def option(self, name: str) -> Path | None:
        """A path among the options the run was begun with: data, val or init_from; None where it was not given.

        Raises:
            InputError: as `recipe`.
        """
        value = self._config()["options"][name]
        return None if value is None else Path(value)

    def _config(self) -> dict[str, Any]:
        """The contents of config.json."""
        try:
            plain: dict[str, Any] = json.loads(self.config.read_text())
        except FileNotFoundError as error:
            raise InputError(
                f"{self.path} is no run folder (it has no config.json): give the --out of mvssl-train."
            ) from error
        except (OSError, ValueError) as error:
            raise InputError(f"{self.config} cannot be read ({error}): restore it or start the run again.") from error
        return plain

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from training in this folder, which is there, meanwhile.

        The folder itself is locked, so that no file is left behind. A file system without locks lets everybody in.

        Raises:
            InputError: a run is going on in it.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise InputError(
                f"Another process is training in {self.path}: wait for it, stop it, or choose another folder with "
                "--out."
            ) from error
        except OSError:  # some network file systems have none
            pass
        try:
            yield
        finally:
            os.close(descriptor)

    def has_checkpoint(self) -> bool:
        """Whether the run has saved anything yet, be it damaged."""
        return self.last.is_symlink() or any(self.checkpoints.glob("step-*"))

    def begin(self, recipe: Recipe, options: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make the folder for a new run.

        Raises:
            InputError: it holds a run and `overwrite` is not set, holds something else, or cannot be written.
        """
        self.check_free(overwrite=overwrite)
        try:
            self._delete()
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.config, {"recipe": to_dict(recipe), "options": dict(options)})
            write_json(self.environment, environment())
        except OSError as error:
            raise InputError(
                f"out is {str(self.path)!r} but cannot be written ({error.strerror or error}): choose another "
                "folder with --out."
            ) from error

    def check_free(self, *, overwrite: bool) -> None:
        """Check that a new run may begin here, before any work is done for it.

        Raises:
            InputError: the folder holds a run and `overwrite` is not set, or holds something else.
        """
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return  # a file in its place, or above it, is told when the folder is made
        if not self._is_run():
            raise InputError(
                f"out is {str(self.path)!r}, which exists and is no run folder, so it is left alone: choose "
                "another --out."
            )
        if not overwrite:
            raise InputError(
                f"out is {str(self.path)!r}, which already holds a run: add --resume to go on with it, --overwrite to "
                "delete it and begin anew, or choose another --out."
            )

    def _is_run(self) -> bool:
        """Whether config.json is one of ours (other programs write files of that name, too)."""
        try:
            return {"recipe", "options"} <= self._config().keys()
        except InputError:
            return False

    def _delete(self) -> None:
        """Delete what a run writes, and nothing else that lies in its folder."""
        for path in (self.tensorboard, self.csv, self.wandb, self.checkpoints, self.evaluations):
            if path.exists():
                shutil.rmtree(path)
        for path in (value for value in vars(self).values() if value not in (self.path, self.last)):
            path.unlink(missing_ok=True)

    def extend(self, recipe: Recipe) -> int | None:
        """Write down that the run now has this recipe, if it has more epochs than before; gives the earlier number."""
        begun = self.recipe()
        if recipe.epochs == begun.epochs:
            return None
        config = self._config()
        config["options"].setdefault("earlier_epochs", []).append(begun.epochs)
        write_json(self.config, {"recipe": to_dict(recipe), "options": config["options"]})
        return begun.epochs

    def check_same_recipe(self, recipe: Recipe, *, extend: bool = False) -> None:
        """Check that a resumed run has the recipe it was begun with, or with `extend` that recipe for more epochs.

        Raises:
            InputError: it differs; the message says in which fields.
        """
        begun = self.recipe()
        if recipe.epochs != begun.epochs and to_dict(replace(recipe, epochs=begun.epochs)) == to_dict(begun):
            if not extend:
                raise InputError(
                    f"The run in {self.path} was begun for {begun.epochs} epochs and not {recipe.epochs}: leave "
                    "--epochs out to finish it as it is, or add --extend to let it train for more."
                )
            if recipe.epochs < begun.epochs:
                raise invalid("epochs", recipe.epochs, f"more than the {begun.epochs} of the run", "raise --epochs")
            return
        changed = differences(to_dict(begun), to_dict(recipe))
        if changed:
            raise InputError(
                f"The run in {self.path} was begun with another recipe ({'; '.join(changed)}): resume it with the same "
                "recipe and overrides, or begin a new run with another --out (--init-from takes its weights along)."
            )
