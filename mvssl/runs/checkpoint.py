"""Checkpoints that survive a kill at any moment: written aside, synced, checked, then renamed.

``checkpoints/step-00001200/`` holds ``state.pt`` (tensors, readable by torch.load) and ``checkpoint.json`` (position,
recipe, checksum); ``checkpoints/last`` is a link to the newest one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from pipelines.runtime import InputError

FORMAT = 2
LAST = "last"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint as read: `state` holds tensors and plain values, `meta` what checkpoint.json says."""

    state: dict[str, Any]
    meta: dict[str, Any]
    path: Path


class _HashingFile(io.RawIOBase):
    """Hands writes to a file and hashes them on the way, so that the bytes need not be read again."""

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


def _sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(root: Path, *, step: int, state: Mapping[str, Any], meta: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` under `root` and make it the last one; older ones beyond `keep` are deleted.

    Returns the checkpoint's folder. A checkpoint of this step that exists already is replaced.

    Raises:
        InputError: it could not be written (the disk is full, say); the earlier checkpoints are untouched.
    """
    final, aside, old = (root / f"{prefix}-{step:08d}" for prefix in ("step", ".writing", ".old"))
    file: _HashingFile | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in [*root.glob(".writing-*"), *root.glob(".old-*")]:
            shutil.rmtree(leftover)
        aside.mkdir()
        with _HashingFile(aside / "state.pt") as file:
            torch.save(dict(state), cast(IO[bytes], file))
        described = {"format": FORMAT, "step": step, "sha256": file.sha256.hexdigest(), **meta}
        with (aside / "checkpoint.json").open("w") as text:
            json.dump(described, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        _sync_folder(aside)
        if final.exists():
            final.rename(old)
        aside.rename(final)
        link = root / f".{LAST}"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(root / LAST)
        _sync_folder(root)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        kept = (root / LAST).resolve().name if (root / LAST).exists() else "none yet"
        cause = (file.error if file is not None else None) or error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise InputError(
            f"The checkpoint of step {step} could not be written to {root} ({reason}); the last good one is intact "
            f"({kept}): free space or mend the folder, then go on with --resume."
        ) from error
    # Those of later steps, which a run that went back to an earlier one left, are not counted and not touched.
    for outdated in [path for path in sorted(root.glob("step-*")) if path.name <= final.name][:-keep]:
        shutil.rmtree(outdated)
    return final


def _link(name: str, path: Path) -> str:
    """The shell command that makes checkpoint `name` the last one."""
    return f"ln -sfn {name} {path.parent / LAST}"


def load(path: Path, *, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Read and verify a checkpoint folder (or a link to one, such as ``checkpoints/last``).

    Raises:
        InputError: there is none, it is damaged, or it is of another format; the message names one that could be used.
    """
    if not path.is_dir():
        newest = [candidate.name for candidate in sorted(path.parent.glob("step-*"))][-1:]
        raise InputError(
            f"{path} is no checkpoint: "
            + (f"to use the newest one, run: {_link(newest[0], path)}." if newest else "check the path.")
        )
    name = path.resolve().name
    earlier = [candidate.name for candidate in sorted(path.parent.glob("step-*")) if candidate.name < name][-1:]
    remedy = (
        f"to use the one before it, run: {_link(earlier[0], path)}"
        if earlier
        else "there is no earlier one, so the training has to start again"
    )
    try:
        meta = json.loads((path / "checkpoint.json").read_text())
        data = (path / "state.pt").read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"The checkpoint {path} is damaged ({error}): {remedy}.") from error
    if meta.get("format") != FORMAT:
        raise InputError(
            f"The checkpoint {path} has format {meta.get('format')!r} but this version of mvssl reads format {FORMAT}: "
            "use the version that wrote it."
        )
    if hashlib.sha256(data).hexdigest() != meta["sha256"]:
        raise InputError(f"The checkpoint {path} is damaged (state.pt does not match its checksum): {remedy}.")
    state = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    return Checkpoint(state=state, meta=meta, path=path)
