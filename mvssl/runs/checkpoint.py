"""Checkpoints that survive a kill at any moment: written to a temporary folder, synced, then renamed.

``checkpoints/step-00001200/`` holds ``state.pt`` (tensors, readable by torch.load) and ``checkpoint.json`` (position,
recipe, checksum); ``checkpoints/last`` links to the newest one.
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

from pipelines.files import sync_folder, write_whole
from pipelines.runtime import FULL, InputError, describe_free

FORMAT = 2
LAST = "last"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint: `state` holds tensors and plain values, `meta` the contents of checkpoint.json."""

    state: dict[str, Any]
    meta: dict[str, Any]
    path: Path


def save(root: Path, *, step: int, state: Mapping[str, Any], meta: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` under `root`, link it as the last one, and delete all but the newest `keep`.

    A checkpoint of the same step is replaced. Returns the checkpoint's folder.

    Raises:
        InputError: it cannot be written (the disk is full, say); earlier checkpoints are untouched.
    """
    final, temporary, old = (root / f"{prefix}-{step:08d}" for prefix in ("step", ".writing", ".old"))
    file: _HashingFile | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in [*root.glob(".writing-*"), *root.glob(".old-*")]:
            shutil.rmtree(leftover)
        temporary.mkdir()
        with _HashingFile(temporary / "state.pt") as file:
            torch.save(dict(state), cast(IO[bytes], file))
        described = {"format": FORMAT, "step": step, "sha256": file.sha256.hexdigest(), **meta}
        write_whole(temporary / "checkpoint.json", json.dumps(described, indent=1))  # syncs the folder, too
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        link = root / f".{LAST}"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(root / LAST)
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
        shutil.rmtree(outdated)
    return final


def load(path: Path, *, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Read and verify a checkpoint folder, or a link to one such as ``checkpoints/last``.

    Raises:
        InputError: there is none, it is damaged, or it has another format; the message names a usable one.
    """
    names = [candidate.name for candidate in sorted(path.parent.glob("step-*"))]
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
