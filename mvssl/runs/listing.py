"""Finds the runs below a folder and reads how far each came, from the ends of its files and without torch."""

from __future__ import annotations

import fcntl
import math
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from glob import glob
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mvssl.config.recipe import Recipe
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_metrics
from mvssl.runs.summary import Summary, read_summary
from pipelines.files import check_nesting, open_regular, parse_json, read_json
from pipelines.runtime import InputError, describe_os_error, shown

State = Literal["running", "finished", "stopped", "diverged", "resumable", "no checkpoint", "broken"]
DEPTH = 5  # folders below the one that is searched
_TAIL = 1 << 16  # bytes read at a time from the end of a file
_MOST = 1 << 24  # bytes read of a file in search of the last row of a kind
_SPEED_ROWS = 20
_OWN = ("metrics.jsonl", "throughput.jsonl", "environment.json", "checkpoints", "train.log")
"""Names that a run without a readable config.json still has, two or more of them."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How far a run came, and what it last measured; None where it is not known.

    Attributes:
        path: its folder.
        name: `run_name`, or that of the folder.
        state: running (its folder is locked); finished; stopped (saved on request, see `stopped_by`); diverged;
            resumable (it ended without saying so, and has a checkpoint); no checkpoint (the same: it starts again);
            broken (see `reason`).
        stopped_by: name of the signal, or "The end of --time".
        reason: what is broken; "" otherwise.
        recipe, method, backbone: names.
        data: path of the images.
        batch_size, epochs: of the whole run.
        epochs_done: with a fraction.
        step, steps: done and planned.
        loss: last logged.
        knn, k: last kNN top-1 accuracy in [0, 1], and its number of neighbours.
        images_per_second: source images/s since it was last started or resumed, without evaluations and saves; while it
            goes on, over its last log points.
        changed: when it last wrote, in seconds since 1970.
    """

    path: Path
    name: str
    state: State
    stopped_by: str | None = None
    reason: str = ""
    recipe: str | None = None
    method: str | None = None
    backbone: str | None = None
    data: str | None = None
    batch_size: int | None = None
    epochs: int | None = None
    epochs_done: float | None = None
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    knn: float | None = None
    k: int | None = None
    images_per_second: float | None = None
    changed: float = 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON values, None for what is no finite number; `changed` in ISO 8601, UTC."""
        when = datetime.fromtimestamp(self.changed, UTC).isoformat(timespec="seconds")
        own = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}
        return {**own, "path": str(self.path), "changed": when, "resumable": self.resumable}

    @property
    def resumable(self) -> bool:
        """Whether --resume continues it."""
        return self.state in ("stopped", "resumable", "diverged", "lost")


SORTS: dict[str, Callable[[RunState], Any]] = {
    "newest": lambda run: -run.changed,
    "oldest": lambda run: run.changed,
    "name": lambda run: (run.name, str(run.path)),
    "recipe": lambda run: (run.recipe or "", -run.changed),
    "state": lambda run: (run.state, -run.changed),
    "epochs": lambda run: -(run.epochs_done or 0.0),
    "loss": lambda run: float("inf") if run.loss is None else run.loss,
    "knn": lambda run: -(-1.0 if run.knn is None else run.knn),
    "speed": lambda run: -(run.images_per_second or 0.0),
}
"""Orders of a list; kNN, epochs and speed with the highest first, loss with the lowest."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What lies below some folders.

    Attributes:
        runs: folders of runs, intact or broken.
        others: folders with a config.json that is no run's, and folders that cannot be read, each with the reason.
    """

    runs: list[Path]
    others: dict[Path, str]


def expand(paths: Sequence[Path]) -> list[Path]:
    """The folders that these paths and patterns name.

    Raises:
        InputError: one does not exist, is no folder, or matches none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        matches = [path] if path.exists() else [Path(name) for name in sorted(glob(str(path)))]
        folders = [match for match in matches if match.is_dir()]
        if not folders:
            what = "is no folder" if path.exists() else "does not exist"
            raise InputError(f"runs is {str(path)!r}, which {what}: give run folders, or a folder with runs in it.")
        found |= dict.fromkeys(folders)
    return list(found)


def named_runs(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """The runs that paths and patterns name, each once: run folders, or all intact runs below other folders.

    Returns:
        The runs, and the broken ones that were found below a folder, each with the reason.

    Raises:
        InputError: a path does not exist, or holds no run.
    """
    runs: dict[Path, Path] = {}
    left_out: dict[Path, str] = {}
    exact = {path for path in paths if path.exists()}
    for folder in expand(paths):
        found = find_runs(folder)
        if found.runs == [folder] or (not found.runs and folder in exact):
            runs.setdefault(folder.resolve(), folder)  # what is wrong with it is reported by who reads it
            continue
        reasons = {path: run_state(path).reason or _damage(path) for path in found.runs}
        left_out |= found.others | {path: reason for path, reason in reasons.items() if reason}
        for path, reason in reasons.items():
            if not reason:
                runs.setdefault(path.resolve(), path)
    if not runs:
        raise InputError(f"runs is {', '.join(map(str, paths))!r}, where no run is: give the --out of mvssl-train.")
    return list(runs.values()), left_out


def _damage(path: Path) -> str:
    """What is wrong with a run's metrics, of which `run_state` reads the end only; "" if nothing is."""
    try:
        deque(read_metrics(RunFolder(path).metrics), maxlen=0)
    except FileNotFoundError:
        return ""
    except InputError as error:
        return str(error)
    return ""


def find_runs(folder: Path) -> Found:
    """Search a folder and those below it, up to `DEPTH` deep; links to folders are not followed."""
    found = Found(runs=[], others={})
    for path in _folders(folder, DEPTH, found.others):
        kind = _kind(path)
        if kind is None:
            continue
        if kind:
            found.others[path] = kind
        else:
            found.runs.append(path)
    return found


def _folders(folder: Path, depth: int, unread: dict[Path, str]) -> Iterator[Path]:
    """The folder and those below it, but not below runs."""
    yield folder
    if depth == 0 or _kind(folder) == "":
        return
    try:
        with os.scandir(folder) as entries:
            below = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError as error:
        unread[folder] = describe_os_error(error)
        return
    for name in below:
        if not name.startswith((".", "__")):
            yield from _folders(folder / name, depth - 1, unread)


def _kind(folder: Path) -> str | None:
    """ "" for a run, the reason for a folder whose config.json is another program's, None for any other."""
    try:
        content = read_json(folder / "config.json")
        if isinstance(content, dict) and isinstance(content.get("recipe"), dict) and "options" in content:
            return ""
        reason = "its config.json is no run's"
    except FileNotFoundError:
        reason = None
    except (OSError, ValueError) as error:
        reason = f"its config.json cannot be read ({error})"
    own = sum((folder / name).exists() for name in _OWN)
    return "" if own >= 2 else reason


def run_state(path: Path) -> RunState:
    """How far a run came. What is damaged makes it broken, and raises nothing."""
    folder = RunFolder(path)
    changed = _changed(folder)
    try:
        recipe, options = folder.recipe(), folder.options()
    except InputError as error:
        return RunState(path=path, name=path.name, state="broken", reason=str(error), changed=changed)
    known: dict[str, Any] = {
        "path": path,
        "name": options.get("run_name") or path.name,
        "recipe": recipe.name,
        "method": recipe.method,
        "backbone": recipe.backbone.name,
        "data": options.get("data"),
        "batch_size": recipe.batch_size,
        "epochs": recipe.epochs,
        "changed": changed,
    }
    try:
        return RunState(**known, **_progress(folder, recipe, options))
    except (InputError, OSError, ValueError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
        return RunState(**known, state="broken", reason=reason)


def _progress(folder: RunFolder, recipe: Recipe, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of `RunState` that change while a run goes on."""
    train = last_row(folder.metrics, "train")
    knn = last_row(folder.metrics, "knn") if recipe.evaluation.every_epochs else None
    summary = read_summary(folder.summary)
    saved = _saved_step(folder)
    step = max(int(train["step"]) if train else 0, saved or 0)
    steps = _planned(folder, recipe, options, summary)
    state, stopped_by = _state(folder, summary, step=step, saved=saved, steps=steps)
    done = step * recipe.epochs / steps if steps else None
    ended = summary if state in ("finished", "stopped", "diverged") else None
    return {
        "state": state,
        "stopped_by": stopped_by,
        "step": step,
        "steps": steps,
        "epochs_done": None if done is None else round(done, 3),
        "loss": _number(folder.metrics, train, "loss"),
        "knn": _number(folder.metrics, knn, "top1"),
        "k": None if knn is None or not recipe.evaluation.k else recipe.evaluation.k[0],
        "images_per_second": ended.images_per_second if ended is not None else _speed(folder.throughput),
    }


def _state(
    folder: RunFolder, summary: Summary | None, *, step: int, saved: int | None, steps: int | None
) -> tuple[State, str | None]:
    """The state, and what stopped the run."""
    if is_locked(folder.path):
        return "running", None
    if summary is not None and summary.step >= (saved or 0):  # else a later part of the run was killed
        if summary.stopped_by is None and summary.step >= (steps or summary.total_steps):
            return "finished", None
        if summary.stopped_by == "divergence":
            return "diverged", None
        if summary.stopped_by is not None and summary.step >= step:
            return "stopped", summary.stopped_by
    if saved is not None and steps is not None and saved >= steps:
        return "finished", None
    if folder.failure.exists() and summary is None:
        return "diverged", None
    return ("no checkpoint" if saved is None else "resumable"), None


def is_locked(folder: Path) -> bool:
    """Whether a process trains in a folder now."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _planned(folder: RunFolder, recipe: Recipe, options: dict[str, Any], summary: Summary | None) -> int | None:
    """Steps of the whole run: by the number of its images, else as it said when it last ended."""
    images = _image_count(folder.data)
    if images is not None:
        return recipe.epochs * (images // recipe.batch_size)
    if summary is not None and not options.get("earlier_epochs"):
        return summary.total_steps
    return None


def _image_count(path: Path) -> int | None:
    """Number of images in a run's record of its data, of which only a header is read; None without one."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("labels.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, _ = read(file)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, NotImplementedError):
        return None
    return int(shape[0]) if len(shape) == 1 else None


def _saved_step(folder: RunFolder) -> int | None:
    """The step of the last checkpoint; None if there is none."""
    name = os.readlink(folder.last) if folder.last.is_symlink() else folder.newest.name
    number = Path(name).name.removeprefix("step-")
    return int(number) if number.isascii() and number.isdecimal() else None


def _speed(path: Path) -> float | None:
    """Source images/s over the last rows of throughput.jsonl."""
    rows = []
    for line in _lines_from_end(path):
        row = _row(path, line)
        if isinstance(row.get("seconds"), (int, float)) and isinstance(row.get("images_per_second"), (int, float)):
            rows.append(row)
        if len(rows) == _SPEED_ROWS:
            break
    seconds = sum(row["seconds"] for row in rows)
    return sum(row["images_per_second"] * row["seconds"] for row in rows) / seconds if seconds > 0 else None


def last_row(path: Path, kind: str) -> dict[str, Any] | None:
    """The last row of a kind in metrics.jsonl; None if there is none.

    Raises:
        InputError: a line behind it is damaged.
    """
    mark = f'"{kind}"'.encode()
    for line in _lines_from_end(path):
        if mark in line:
            row = _row(path, line)
            if row.get("kind") == kind:
                if not isinstance(row.get("step"), int):
                    raise InputError(f"{path} is damaged (a row of kind {kind} has no step): restore it.")
                return row
        elif not line.startswith(b"{"):
            _row(path, line)
    return None


def _number(path: Path, row: dict[str, Any] | None, name: str) -> float | None:
    """A number of a row; None without one."""
    value = None if row is None else row.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise InputError(f"{path} is damaged ({name} is {shown(value)}, no number): restore it, or delete the line.")
    return value


def _row(path: Path, line: bytes) -> dict[str, Any]:
    """A line as a row."""
    try:
        row = parse_json(line)
        check_nesting(row, numbers=True)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): restore it, or delete the broken line.") from error
    if not isinstance(row, dict):
        raise InputError(f"{path} is damaged (a line is no table): restore it, or delete the broken line.")
    return row


def _lines_from_end(path: Path) -> Iterator[bytes]:
    """The complete lines of a file, the last one first, of its last `_MOST` bytes; none if there is no file."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        least, rest, complete = max(0, end - _MOST), b"", False
        while end > least:
            start = max(least, end - _TAIL)
            file.seek(start)
            rest = file.read(end - start) + rest
            end = start
            if not complete:  # a kill may have cut the last line short
                last = rest.rfind(b"\n")
                if last < 0:
                    continue
                rest, complete = rest[:last], True
            pieces = rest.split(b"\n")
            for line in reversed(pieces[1:]):
                if line:
                    yield line
            rest = pieces[0]
        if complete and end == 0 and rest:
            yield rest


def _changed(folder: RunFolder) -> float:
    """When the run last wrote, in seconds since 1970."""
    times = [0.0]
    for path in (folder.metrics, folder.config, folder.summary, folder.log):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times) or _mtime(folder.path)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
