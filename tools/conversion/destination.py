"""The folder that is converted into: whose it is, and what in it is ours."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pipelines.errors import InputError
from pipelines.storage.manifest import INDEX, KEYS, MANIFEST, QUARANTINE, WARNINGS, WORK, Manifest
from pipelines.storage.shards import ShardSource
from tools.conversion.files import write_whole

_PLAN = "plan.json"


class Destination:
    """One folder of shards in the making."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / WORK
        self._lock: IO[bytes] | None = None

    def prepare(self, plan: Mapping[str, Any], *, overwrite: bool) -> bool:
        """Make the folder ready for `plan`; whether it holds the finished result of just this plan already.

        Args:
            plan: source and options; JSON values only.
            overwrite: remove converted data that is there.

        Raises:
            InputError: other data or another conversion is there, or another process is writing.
            OSError: the folder cannot be written.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"DST {self.folder} is a file: give a folder, new or empty.")
        ours = (self.folder / MANIFEST).exists() or self.work.exists()
        if self.folder.exists() and not ours and any(self.folder.iterdir()):
            raise InputError(f"DST {self.folder} holds other files: give a folder that is new or empty.")
        if (self.folder / MANIFEST).exists() and not overwrite:
            if dict(Manifest.load(self.folder).plan) != dict(plan):
                raise self._other("holds the conversion")
            ShardSource(self.folder).close()  # raises if a shard is missing or damaged
            shutil.rmtree(self.work, ignore_errors=True)  # left over if the last run was killed right at its end
            return True
        self.work.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        stored = self._stored_plan()
        if overwrite or stored is None:
            self._clear()
        elif stored is not None and stored != dict(plan):
            raise self._other("holds an unfinished conversion")
        write_whole(self.work / _PLAN, json.dumps(plan, indent=1, sort_keys=True).encode())
        return False

    def part(self, number: int) -> Path:
        """File for the index part of planned shard `number`."""
        return self.work / f"part-{number:06d}.npz"

    def shard(self, number: int) -> Path:
        """File of planned shard `number`."""
        return self.folder / f"shard-{number:06d}.tar"

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, which makes the folder converted data, and remove what was needed on the way."""
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=True).encode())
        shutil.rmtree(self.work)
        self.release()

    def release(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        lock = (self.work / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            lock.close()
            raise InputError(
                f"another mvssl-convert is writing to {self.folder}: wait for it, or give another DST."
            ) from None
        self._lock = lock

    def _stored_plan(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.work / _PLAN).read_text()))
        except (FileNotFoundError, ValueError):
            return None

    def _other(self, what: str) -> InputError:
        return InputError(
            f"DST {self.folder} {what} of another source or with other options: give another DST, repeat the first "
            "command, or add --overwrite."
        )

    def _clear(self) -> None:
        (self.folder / MANIFEST).unlink(missing_ok=True)  # first: without it nothing here counts as finished
        for name in (MANIFEST, INDEX, KEYS, QUARANTINE, WARNINGS, "shard-[0-9]*.tar"):
            for path in (*self.folder.glob(name), *self.folder.glob(f"{name}.tmp")):
                path.unlink()
        for path in self.work.iterdir():
            if path.name != "lock":
                path.unlink()
