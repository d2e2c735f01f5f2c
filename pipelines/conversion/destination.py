"""Output folder of a conversion: file names, ownership, locking and clean-up."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.files import locked, read_json, temporary_path, write_whole
from pipelines.runtime import InputError
from pipelines.storage import open_source
from pipelines.storage.beton_format import BETON
from pipelines.storage.manifest import (
    CHECKSUMS,
    FORMATS,
    INDEX,
    KEYS,
    MANIFEST,
    PLAN,
    QUARANTINE,
    WARNINGS,
    WORK,
    Manifest,
    is_converted,
)

_LOCK = "lock"
_ATTEMPTS = 100  # at a lock in a folder that other processes keep removing


def unfinished(path: Path) -> Path:
    """Name of a shard or .beton file before it is complete; a resumed conversion relies on it."""
    return path.with_name(path.name + ".tmp")


class Destination:
    """One folder of converted data during its conversion."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / WORK
        self._lock = contextlib.ExitStack()

    def state(self, number: int) -> Path:
        """File for the state of planned shard `number`."""
        return self.work / f"part-{number:06d}.npz"

    def shard(self, number: int) -> Path:
        """File of planned shard `number`."""
        return self.folder / f"shard-{number:06d}.tar"

    @property
    def beton(self) -> Path:
        """The .beton file."""
        return self.folder / BETON

    def prepare(self, plan: Mapping[str, Any], *, overwrite: bool) -> bool:
        """Lock the folder for a conversion; True without a lock if it holds the finished result of this very plan.

        Args:
            plan: source and options; JSON values only.
            overwrite: remove converted data.

        Raises:
            InputError: the folder holds other data or another conversion, or another process is writing to it.
            OSError: the folder cannot be written.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"DST {self.folder} is a file: give a folder, new or empty.")
        if self.folder.exists() and not is_converted(self.folder) and not self._is_almost_empty():
            raise InputError(f"DST {self.folder} holds other files: give a folder that is new or empty.")
        if not overwrite and not self.work.exists() and self._is_finished(plan):
            return True  # without a write: the folder may be read-only
        self._take_lock()
        try:
            if not overwrite and self._is_finished(plan):  # by the process that held the lock before
                self._remove_work()
                return True
            stored = self._stored_plan()
            if overwrite or stored is None:
                self._clear()
            elif stored != dict(plan):
                raise self._conflict("holds an unfinished conversion")
            write_whole(self.work / PLAN, json.dumps(plan, indent=1, sort_keys=True))
        except BaseException:
            self.release()
            raise
        return False

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, which completes the converted data, and remove the state of the conversion."""
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=True))
        self._remove_work()

    def release(self) -> None:
        """Let another process write."""
        self._lock.close()

    def _is_almost_empty(self) -> bool:
        """Whether the folder is empty, or has only the files of a conversion that was killed before it had a plan."""
        if any(path.name != WORK for path in self.folder.iterdir()):
            return False
        ours = {_LOCK, temporary_path(Path(PLAN)).name, f"{PLAN}.tmp"}  # the last one by earlier releases
        return not self.work.exists() or all(path.name in ours for path in self.work.iterdir())

    def _is_finished(self, plan: Mapping[str, Any]) -> bool:
        if not (self.folder / MANIFEST).exists():
            return False
        if dict(Manifest.load(self.folder, formats=FORMATS).plan) != dict(plan):
            raise self._conflict("holds the conversion")
        open_source(self.folder).close()  # raises if a file is missing or damaged
        return True

    def _take_lock(self) -> None:
        busy = f"another mvssl-convert is writing to {self.folder}: wait for it, or give another DST."
        for _ in range(_ATTEMPTS):
            self.work.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # a process that has just finished removed the folder
                self._lock.enter_context(locked(self.work / _LOCK, busy))
                return
        raise InputError(busy)

    def _remove_work(self) -> None:
        """Remove the work folder and release the lock; errors are ignored, because the result is complete."""
        with contextlib.suppress(OSError):
            for path in self.work.iterdir():
                if path.name != _LOCK:
                    path.unlink()
            (self.work / _LOCK).unlink()  # last: another process may start from here on
        self.release()
        with contextlib.suppress(OSError):
            self.work.rmdir()

    def _stored_plan(self) -> dict[str, Any] | None:
        try:
            plan = read_json(self.work / PLAN)
            return dict(plan) if isinstance(plan, dict) else None
        except (FileNotFoundError, ValueError):
            return None

    def _conflict(self, problem: str) -> InputError:
        return InputError(
            f"DST {self.folder} {problem} of another source or with other options: give another DST, repeat the first "
            "command, or add --overwrite."
        )

    def _clear(self) -> None:
        """Remove our files: the manifest first, and last (index, plan) those that identify the others as ours."""
        for pattern in (MANIFEST, "shard-[0-9]*.tar", BETON, KEYS, CHECKSUMS, QUARANTINE, WARNINGS):
            for name in (pattern, f"{pattern}.tmp", temporary_path(Path(pattern)).name):
                for path in self.folder.glob(name):
                    path.unlink()
        for path in self.work.iterdir():
            if path.name not in (_LOCK, PLAN):
                path.unlink()
        for path in (
            self.folder / f"{INDEX}.tmp",
            temporary_path(self.folder / INDEX),
            self.folder / INDEX,
            self.work / PLAN,
        ):
            path.unlink(missing_ok=True)
