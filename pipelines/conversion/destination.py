"""The folder that is converted into: whose it is, and what in it is ours.

Write files so that they are either whole or not there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pipelines.runtime import InputError
from pipelines.storage import open_source
from pipelines.storage.beton_format import BETON
from pipelines.storage.manifest import (
    FORMATS,
    INDEX,
    KEYS,
    MANIFEST,
    PLAN,
    QUARANTINE,
    WARNINGS,
    WORK,
    Manifest,
    is_ours,
)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give operating-system errors that name no file (a full disk while writing) the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def temporary_name(path: Path) -> Path:
    """The name a file has until it is whole."""
    return path.with_name(path.name + ".tmp")


def rename_into_place(path: Path) -> None:
    """Give a whole, synced temporary file its name, so that it also survives a power cut."""
    temporary_name(path).replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`: temporary name, fsync, rename.

    Raises:
        OSError: it cannot be written; the temporary file is removed.
    """
    temporary = temporary_name(path)
    try:
        with naming(temporary), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    rename_into_place(path)


_LOCK = "lock"
_ATTEMPTS = 100  # to lock a file that other processes keep removing


class Destination:
    """One folder of converted data in the making."""

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
        if self.folder.exists() and not is_ours(self.folder) and not self._is_as_good_as_empty():
            raise InputError(f"DST {self.folder} holds other files: give a folder that is new or empty.")
        if not overwrite and not self.work.exists() and self._is_finished(plan):
            return True  # without the lock, so without a write: the folder may be read-only
        self._take_lock()
        try:
            # Only now: a process that had the lock may have finished its conversion meanwhile.
            if not overwrite and self._is_finished(plan):
                self._remove_work()  # left over if the last run was killed right at its end
                return True
            stored = self._stored_plan()
            if overwrite or stored is None:
                self._clear()
            elif stored != dict(plan):
                raise self._other("holds an unfinished conversion")
            write_whole(self.work / PLAN, json.dumps(plan, indent=1, sort_keys=True).encode())
        except BaseException:
            self.release()
            raise
        return False

    def part(self, number: int) -> Path:
        """File for the index part of planned shard `number`."""
        return self.work / f"part-{number:06d}.npz"

    def shard(self, number: int) -> Path:
        """File of planned shard `number`."""
        return self.folder / f"shard-{number:06d}.tar"

    @property
    def beton(self) -> Path:
        """The .beton file."""
        return self.folder / BETON

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, which makes the folder converted data, and remove what was needed on the way."""
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=True).encode())
        self._remove_work()

    def release(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _is_as_good_as_empty(self) -> bool:
        """Whether there is nothing, or only what a conversion leaves that was killed before it had a plan."""
        if any(path.name != WORK for path in self.folder.iterdir()):
            return False
        return not self.work.exists() or all(path.name in (_LOCK, f"{PLAN}.tmp") for path in self.work.iterdir())

    def _is_finished(self, plan: Mapping[str, Any]) -> bool:
        if not (self.folder / MANIFEST).exists():
            return False
        if dict(Manifest.load(self.folder, formats=FORMATS).plan) != dict(plan):
            raise self._other("holds the conversion")
        open_source(self.folder).close()  # raises if a file is missing or damaged
        return True

    def _take_lock(self) -> None:
        for _ in range(_ATTEMPTS):
            self.work.mkdir(parents=True, exist_ok=True)
            try:
                lock = (self.work / _LOCK).open("ab")
            except FileNotFoundError:  # a process that finished has just removed the folder
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
            except BlockingIOError:
                lock.close()
                break
            if self._is_current(lock):
                self._lock = lock
                return
            lock.close()
        raise InputError(f"another mvssl-convert is writing to {self.folder}: wait for it, or give another DST.")

    def _is_current(self, lock: IO[bytes]) -> bool:
        """Whether the locked file still has its name: a process that finished may have removed it in between."""
        try:
            return os.path.samestat(os.fstat(lock.fileno()), os.stat(self.work / _LOCK))
        except FileNotFoundError:
            return False

    def _remove_work(self) -> None:
        """Remove the work folder and release the lock; the result is whole, so that a failure does no harm."""
        with contextlib.suppress(OSError):
            for path in self.work.iterdir():
                if path.name != _LOCK:
                    path.unlink()
            (self.work / _LOCK).unlink()  # last: from here on another process may begin
        self.release()
        with contextlib.suppress(OSError):
            self.work.rmdir()

    def _stored_plan(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.work / PLAN).read_text()))
        except (FileNotFoundError, ValueError):
            return None

    def _other(self, what: str) -> InputError:
        return InputError(
            f"DST {self.folder} {what} of another source or with other options: give another DST, repeat the first "
            "command, or add --overwrite."
        )

    def _clear(self) -> None:
        """Remove our data: first what makes it finished, last (index, plan) what shows that the rest is ours."""
        for name in (MANIFEST, "shard-[0-9]*.tar", BETON, KEYS, QUARANTINE, WARNINGS):
            for path in (*self.folder.glob(name), *self.folder.glob(f"{name}.tmp")):
                path.unlink()
        for path in self.work.iterdir():
            if path.name not in (_LOCK, PLAN):
                path.unlink()
        for path in (self.folder / f"{INDEX}.tmp", self.folder / INDEX, self.work / PLAN):
            path.unlink(missing_ok=True)
