"""The folder of a run: its files, and the checks before a run is started, overwritten, extended or resumed in it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from mvssl.config.recipe import Recipe
from mvssl.config.serialize import recorded_recipe, to_dict
from mvssl.runs.changes import record_changes, resumed_recipe
from mvssl.runs.checked_json import read_checked, write_checked, write_json
from mvssl.runs.data_record import DataRecord
from mvssl.runs.environment import environment
from pipelines.files import locked, sync_files, sync_folder, temporary_path
from pipelines.runtime import InputError, shown

logger = logging.getLogger("mvssl")


class RunFolder:
    """Paths of a run's files.

    The same recipe writes the same bytes to metrics.jsonl on every repetition; throughput.jsonl and summary.json depend
    on the machine. failure.json exists only if the run diverged. mvssl-eval writes into eval/.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.environment = path / "environment.json"
        self.data = path / "data.npz"
        self.metrics = path / "metrics.jsonl"
        self.throughput = path / "throughput.jsonl"
        self.log = path / "train.log"
        self.tensorboard = path / "tensorboard"
        self.csv = path / "csv"
        self.wandb = path / "wandb"
        self.mlruns = path / "mlruns"
        self.mlflow = path / "mlflow.json"
        self.report = path / "report.html"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last"
        self.best = self.checkpoints / "best"
        self.backbone = path / "backbone.safetensors"
        self.views = path / "views.png"
        self.losses = path / "losses.png"
        self.neighbours = path / "neighbours.html"
        self.scatter = path / "scatter.html"
        self.attention = path / "attention.html"
        self.attention_picture = path / "attention.png"
        self.failure = path / "failure.json"
        self.evaluations = path / "eval"

    def recipe(self) -> Recipe:
        """The recipe of the run.

        Raises:
            InputError: this is no run folder, or its config.json is damaged.
        """
        try:
            return recorded_recipe(self._config()["recipe"])
        except InputError as error:
            raise InputError(f"{self.config}: {error}", field=error.field) from error

    def options(self) -> dict[str, Any]:
        """The options that the run was started with, as JSON values; raises as `recipe`."""
        options: dict[str, Any] = self._config()["options"]
        return options

    def option(self, name: str) -> Path | None:
        """A path among the options (data, val or init_from); None if it was not given. Raises as `recipe`."""
        value = self.options().get(name)
        return None if value is None else Path(value)

    @property
    def newest(self) -> Path:
        """The last checkpoint; a kill may have come before the first one was linked as such."""
        return self.last if self.last.is_symlink() else max(self.checkpoints.glob("step-*"), default=self.last)

    def has_checkpoint(self) -> bool:
        """Whether the run has saved a checkpoint, intact or damaged."""
        return self.last.is_symlink() or any(self.checkpoints.glob("step-*"))

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Lock the folder against other training processes; create it first, and remove it if nothing is written.

        The folder itself is locked, so that no lock file is left.

        Raises:
            InputError: another process is training in it, or it cannot be created.
        """
        created = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in created:
                sync_folder(path.parent)
        except OSError as error:
            raise self._cannot_be_written(error) from error
        try:
            with locked(
                self.path,
                f"Another process is training in {self.path}: wait for it, stop it, or choose another folder with "
                "--out.",
            ):
                yield
        finally:
            with suppress(OSError):  # they hold files
                for path in created:
                    path.rmdir()

    def sync(self) -> None:
        """Wait until logs and metrics are on the disk, which a power cut then leaves."""
        for path in (self.path, self.tensorboard, self.csv):
            if path.is_dir():
                sync_files(path)

    def check_free(self, *, overwrite: bool) -> None:
        """Check that a new run may begin here, before any work is done for it.

        Raises:
            InputError: the folder holds a run and `overwrite` is not set, or it holds something else.
        """
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return  # `create` reports a file in its place, or above it
        begun = {
            file.name for path in (self.environment, self.data, self.config) for file in (path, temporary_path(path))
        }
        if {path.name for path in self.path.iterdir()} <= begun - {self.config.name}:
            return  # a run that was killed before it had begun
        if not self._is_run():
            raise InputError(
                f"out is {str(self.path)!r}, which exists and is no run folder, so it is left alone: choose "
                "another --out."
            )
        if not overwrite:
            raise InputError(
                f"out is {str(self.path)!r}, which already holds a run: add --resume to continue it, --overwrite to "
                "delete it and start again, or choose another --out."
            )

    def create(self, recipe: Recipe, options: Mapping[str, Any], images: DataRecord, *, overwrite: bool) -> None:
        """Write the first files of a new run into the claimed folder; config.json, the last one, makes it a run."""
        self.check_free(overwrite=overwrite)
        try:
            self._delete()
            write_json(self.environment, environment())
            images.save(self.data)
            write_checked(self.config, {"recipe": to_dict(recipe), "options": dict(options)})
        except OSError as error:
            raise self._cannot_be_written(error) from error

    def _cannot_be_written(self, error: OSError) -> InputError:
        return InputError(
            f"out is {str(self.path)!r} but cannot be written ({error.strerror or error}): choose another folder with "
            "--out.",
            field="out",
        )

    def check_same_recipe(self, recipe: Recipe, *, extend: bool = False) -> Recipe:
        """The recipe with which the run resumes; see `resumed_recipe`.

        Raises:
            InputError: it differs in what may not change; the message names the fields.
        """
        return resumed_recipe(self.recipe(), recipe, extend=extend, run=str(self.path))

    def update(self, recipe: Recipe, *, before: Recipe, step: int) -> int | None:
        """Record the recipe of a resumed run, and what changes; its earlier number of epochs, if that changes.

        Args:
            recipe: of the steps from `step` on.
            before: of the steps before.
            step: number of steps done.
        """
        begun, earlier = self.recipe(), self.options()
        options = record_changes(earlier, before, recipe, step=step)
        extended = recipe.epochs != begun.epochs
        if extended:
            options["earlier_epochs"] = [*options.get("earlier_epochs", ()), begun.epochs]
        if recipe != begun or options != earlier:
            write_checked(self.config, {"recipe": to_dict(recipe), "options": options})
        return begun.epochs if extended else None

    def restore_config(self) -> None:
        """Write config.json again from the copy in a checkpoint, if it is damaged or lost."""
        try:
            self._read_config()
        except (OSError, ValueError) as error:
            write_checked(self.config, self._config())
            logger.warning("%s was damaged (%s) and is restored from the last checkpoint", self.config, error)

    def _config(self) -> dict[str, Any]:
        """The contents of config.json; if it is damaged or lost, the copy in the newest checkpoint that has one."""
        try:
            return self._read_config()
        except (OSError, ValueError) as error:
            for path in sorted(self.checkpoints.glob("step-*/checkpoint.json"), reverse=True):
                with suppress(OSError, ValueError):
                    config = _checked_config(read_checked(path))
                    _warn_of_copy(self.config, str(error), path)
                    return config
            if isinstance(error, FileNotFoundError):
                raise InputError(
                    f"{self.path} is no run folder (it has no config.json): give the --out of mvssl-train."
                ) from error
            raise InputError(f"{self.config} cannot be read ({error}): restore it or start the run again.") from error

    def _read_config(self) -> dict[str, Any]:
        """The contents of config.json; ValueError if it is damaged, or is another program's."""
        return _checked_config(read_checked(self.config))

    def _is_run(self) -> bool:
        """Whether config.json is that of a run (other programs write files of that name, too)."""
        try:
            self._config()
        except InputError:
            return False
        return True

    def check_files(self) -> None:
        """Check the files that training appends to, which may come from somebody else.

        Raises:
            InputError: one is a link out of the folder, or a pipe, folder or device.
        """
        inside = self.path.resolve()
        for path in (self.metrics, self.throughput, self.log, *self.csv.glob("*"), *self.tensorboard.glob("*")):
            if path.is_symlink() and not _target(path).is_relative_to(inside):
                raise InputError(
                    f"{path} is a link to {_target(path)}, outside of the run folder, where nothing is written: put "
                    "the file itself in its place."
                )
            if path.exists() and not path.is_file():
                raise InputError(f"{path} is no regular file: restore the one of the run, or delete it.")

    def _delete(self) -> None:
        """Delete what a run writes, and nothing else in the folder."""
        folders = (self.tensorboard, self.csv, self.wandb, self.mlruns, self.checkpoints, self.evaluations)
        for path in folders:
            if path.is_symlink():
                path.unlink()  # and what it leads to stays
            elif path.exists():
                shutil.rmtree(path)
        for path in vars(self).values():
            if path not in (self.path, self.last, self.best, self.config, *folders):
                path.unlink(missing_ok=True)
        self.config.unlink(missing_ok=True)  # without it, this is no run that may be deleted


@cache
def _warn_of_copy(config: Path, reason: str, copy: Path) -> None:
    """Say once that the recipe and options of a run are those of a checkpoint."""
    logger.warning("%s is damaged (%s): its recipe and options are taken from %s", config, reason, copy)


def _target(link: Path) -> Path:
    """Where a link leads; the link itself if it leads in a circle."""
    try:
        return link.resolve()
    except RuntimeError:
        return link


_OPTIONS: dict[str, type] = {
    **dict.fromkeys(("data", "val", "init_from", "run_name", "notes", "initial_weights"), str),
    **dict.fromkeys(("tags", "changes", "earlier_epochs"), list),
}
_CHANGE = {"step": int, "field": str, "was": object, "now": object}


def _checked_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe and options among JSON values from a file.

    Raises:
        ValueError: they are missing, or an option that is read again has another type.
    """
    config = {name: content.get(name) for name in ("recipe", "options")}
    for name, value in config.items():
        if not isinstance(value, dict):
            raise ValueError(f"it has no table {name!r}")
    options: dict[str, Any] = config["options"] or {}
    for name, kind in _OPTIONS.items():
        if not isinstance(options.get(name), (kind, type(None))):
            raise ValueError(f"its options.{name} is {shown(options[name])}")
    for number, change in enumerate(options.get("changes") or ()):
        if not isinstance(change, dict) or not all(isinstance(change.get(k), v) for k, v in _CHANGE.items()):
            raise ValueError(f"its options.changes[{number}] is {shown(change)}")
    return config
