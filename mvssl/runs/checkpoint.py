"""Checkpoints that survive a kill at any moment: written to a temporary folder, synced, then renamed.

``checkpoints/step-00001200/`` holds ``state.pt`` (tensors, readable by torch.load) and ``checkpoint.json`` (position,
recipe, checksum); ``checkpoints/last`` links to the newest one, ``checkpoints/best`` to that of the best evaluation.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from mvssl.config.recipe import Recipe
from mvssl.config.serialize import recorded_recipe
from mvssl.pickles.torch_file import parse_torch_file
from mvssl.runs.checked_json import check_checksum, read_object, write_checked
from pipelines.files import read_regular, sync_folder
from pipelines.runtime import FULL, InputError, describe_free, invalid, shown

FORMAT = 2
LAST, BEST = "last", "best"
_LARGEST = 1 << 40  # bytes of state.pt


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint: `state` holds tensors and plain values, `meta` the contents of checkpoint.json."""

    state: dict[str, Any]
    meta: dict[str, Any]
    path: Path

    def needs(self, *names: str) -> None:
        """Check that checkpoint.json has these entries; InputError if not."""
        missing = [name for name in names if name not in self.meta]
        if missing:
            raise self.damaged(f"checkpoint.json has no {missing[0]}")

    def recipe(self) -> Recipe:
        """The recipe of the run; InputError if there is none, or another one than this version knows."""
        self.needs("recipe")
        try:
            return recorded_recipe(self.meta["recipe"])
        except InputError as error:
            raise InputError(f"{self.path / 'checkpoint.json'}: {error}", field=error.field) from error

    def network(self, name: str) -> dict[str, Tensor] | None:
        """Tensors of the online or target network of a run by name; None without a target.

        Raises:
            InputError: there are none, or something else.
        """
        step = self.state.get("step")
        tensors = step.get(name, {}) if isinstance(step, dict) else {}
        if tensors is None and name == "target":
            return None
        if not isinstance(tensors, dict) or not tensors or not all(isinstance(x, Tensor) for x in tensors.values()):
            raise self.damaged(f"state.pt has no tensors of the {name} network")
        return {str(key): tensor for key, tensor in tensors.items()}

    def damaged(self, reason: str) -> InputError:
        """The error for a checkpoint whose content cannot be used although its checksum is right."""
        return InputError(
            f"The checkpoint {self.path} is damaged or of another program ({reason}): use another one, or start again."
        )


def save(
    root: Path,
    *,
    step: int,
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    keep: int,
    best: Sequence[int] = (),
) -> Path:
    """Write the checkpoint of `step` under `root`, link it as the last one, and delete all but the newest `keep`.

    A checkpoint of the same step is replaced. The first of the steps `best` that has a checkpoint is linked as the best
    one and kept, too. Returns the checkpoint's folder.

    Raises:
        InputError: it cannot be written (the disk is full, say); earlier checkpoints are untouched.
    """
    final, temporary, old = (root / f"{prefix}-{step:08d}" for prefix in ("step", ".writing", ".old"))
    file: _HashingFile | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in [*root.glob(".writing-*"), *root.glob(".old-*")]:
            _remove(leftover)
        temporary.mkdir()
        with _HashingFile(temporary / "state.pt") as file:
            torch.save(dict(state), cast(IO[bytes], file))
        described = {"format": FORMAT, "step": step, "sha256": file.sha256.hexdigest(), **meta}
        write_checked(temporary / "checkpoint.json", described)  # syncs the folder, too
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _link(root, LAST, final.name)
        linked = link_best(root, best)
        sync_folder(root)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        kept = (root / LAST).resolve().name if (root / LAST).exists() else "none yet"
        cause = (file.error if file is not None else None) or error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        if getattr(cause, "errno", None) in FULL:
            reason += f"; {describe_free(root)}"
        raise InputError(
            f"The checkpoint of step {step} could not be written to {root} ({reason}); the last good one is intact "
            f"({kept}): free space or fix the folder, then continue with --resume."
        ) from error
    # Checkpoints of later steps, left by a run that was set back to an earlier one, are not counted and not touched.
    for outdated in [path for path in sorted(root.glob("step-*")) if path.name <= final.name][:-keep]:
        if outdated.name != _folder_name(linked):
            _remove(outdated)
    return final


def link_best(root: Path, steps: Sequence[int]) -> int | None:
    """Link the first of some steps, the best first, that has a checkpoint as the best one; None if none has.

    Raises:
        OSError: the link cannot be written; an earlier one is untouched.
    """
    step = next((step for step in steps if (root / _folder_name(step)).is_dir()), None)
    if step is not None:
        if not (root / BEST).is_symlink() or os.readlink(root / BEST) != _folder_name(step):
            _link(root, BEST, _folder_name(step))
    elif (root / BEST).is_symlink():
        (root / BEST).unlink()
    return step


def find(root: Path, name: str) -> Path:
    """The checkpoint folder, or link to one, of a name: last, best, or a step such as 1200 or step-00001200.

    Raises:
        InputError: there is none of that name; the message has those that there are.
    """
    steps = [int(path.name[5:]) for path in sorted(root.glob("step-*")) if re.fullmatch(r"step-\d{8,16}", path.name)]
    links = [link for link in (LAST, BEST) if (root / link).is_symlink()]
    asked = re.fullmatch(r"(?:step-)?(\d{1,16})", name)
    if name in links:
        return root / name
    if asked is not None and int(asked[1]) in steps:
        return root / _folder_name(int(asked[1]))
    remedy = "choose from these"
    if name == BEST:
        remedy = "it is kept from the first evaluation on, of images with labels and with --keep-best knn or probe"
    raise invalid("checkpoint", name, f"one of {', '.join([*links, *map(str, steps)]) or 'none yet'}", remedy)


def _folder_name(step: int | None) -> str:
    return "" if step is None else f"step-{step:08d}"


def _link(root: Path, name: str, target: str) -> None:
    link = root / f".{name}"
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    link.replace(root / name)


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint folder, or a link to one such as ``checkpoints/last``; runs no code from it.

    Raises:
        InputError: there is none, it is damaged, or it has another format; the message names a usable one.
    """
    names = [candidate.name for candidate in sorted(path.parent.glob("step-*"))]
    if path.is_symlink() and not _stays(path):
        raise InputError(
            f"{path} is a link to {os.readlink(path)!r} but must be one to a checkpoint beside it: "
            + (f"to use the newest one, run: {_link_command(names[-1], path)}." if names else "check the path.")
        )
    if not path.is_dir():
        raise InputError(
            f"{path} is no checkpoint: "
            + (f"to use the newest one, run: {_link_command(names[-1], path)}." if names else "check the path.")
        )
    earlier = [name for name in names if name < path.resolve().name]
    remedy = (
        f"to use the one before it, run: {_link_command(earlier[-1], path)}"
        if earlier
        else "there is no earlier one, so training has to start again"
    )
    try:
        meta = read_object(path / "checkpoint.json")
        if type(meta.get("format")) is int and meta["format"] != FORMAT:
            raise InputError(
                f"The checkpoint {path} has format {meta['format']} but this version of mvssl reads format {FORMAT}: "
                "use the version that wrote it."
            )
        check_checksum(meta)
        data = read_regular(path / "state.pt", most=_LARGEST)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"The checkpoint {path} is damaged ({error}): {remedy}.") from error
    problem = _problem(meta, path.resolve().name)
    if problem:
        raise InputError(f"The checkpoint {path} is damaged (checkpoint.json: {problem}): {remedy}.")
    if hashlib.sha256(data).hexdigest() != meta["sha256"]:
        raise InputError(f"The checkpoint {path} is damaged (state.pt does not match its checksum): {remedy}.")
    try:
        state = parse_torch_file(io.BytesIO(data))
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("it holds no table of tensors")
    except (OSError, pickle.UnpicklingError) as error:
        raise InputError(f"The checkpoint {path} is damaged (state.pt: {error}): {remedy}.") from error
    return Checkpoint(state=state, meta=meta, path=path)


_KINDS: dict[str, type] = {
    "format": int,
    "step": int,
    "sha256": str,
    "recipe": dict,
    "options": dict,
    "precision": str,
    "ranks": int,
    "data": str,
    "metrics_bytes": int,
    "evaluated": bool,
    "identity": dict,
}
_MOST_STEPS = 1 << 53


def _problem(meta: Mapping[str, Any], folder: str) -> str:
    """What of checkpoint.json is missing or of another kind; "" if nothing. `folder` is the checkpoint's name."""
    for name, kind in _KINDS.items():
        if name not in meta and name not in ("format", "step", "sha256"):
            continue
        value: Any = meta.get(name)
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value <= _MOST_STEPS):
            return f"{name} is {shown(value)}"
    named = re.fullmatch(r"step-(\d{8,16})", folder)
    if named and int(named[1]) != meta.get("step"):
        return f"step is {meta.get('step')} in the folder {folder}"
    return ""


def _remove(path: Path) -> None:
    """Delete a folder, or a link to one."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _stays(link: Path) -> bool:
    """Whether a link leads to something in its own folder."""
    target = link.parent / os.readlink(link)
    return ".." not in Path(os.readlink(link)).parts and target.parent.resolve() == link.parent.resolve()


def _link_command(name: str, path: Path) -> str:
    """The shell command that makes checkpoint `name` the last one."""
    return f"ln -sfn {name} {path.parent / LAST}"


class _HashingFile(io.RawIOBase):
    """A file that hashes what is written to it, so that the bytes need not be read again, and syncs on close."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None  # torch.save hides why a write failed

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def close(self) -> None:
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()
