"""Converts one source to one folder: parallel, resumable, with the same bytes every time."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from pipelines.conversion.beton_writer import BetonFormat
from pipelines.conversion.destination import Destination
from pipelines.conversion.image_check import CheckedImage, WarningLog, check_image
from pipelines.conversion.shard_state import Format, Merged, ShardState
from pipelines.conversion.sources import Job, ReadErrors, SourceGoneError, read
from pipelines.conversion.tar_writer import TarFormat, member_keys
from pipelines.decode.damage import ODD, can_find_damage
from pipelines.decode.limits import ImageLimits, beyond_bytes
from pipelines.files import write_whole
from pipelines.progress import Progress
from pipelines.runtime import InputError
from pipelines.storage.beton_format import page_bytes
from pipelines.storage.forms.base import FormSource
from pipelines.storage.image_facts import facts_of
from pipelines.storage.manifest import FORMATS, INDEX_DTYPE, QUARANTINE, VERSION, WARNINGS, Manifest
from pipelines.storage.source import KeyTable, Source, fingerprint
from pipelines.value_range import ValueRange

_AHEAD = 4  # images in flight per worker: a slow image does not stall the others
_MEMBER_BYTES = 2048  # upper bound of a tar file's overhead per image: two headers, padding and the label


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that determine the converted bytes.

    Attributes:
        max_size: longest side in pixels; None: unchanged.
        quality: encode every image as JPEG of this quality; None: bytes pass through.
        shard_bytes: bytes of images per shard.
        format: "shards" or "beton".
        strict: leave out images that are damaged but decode.
        value_range: of images with more than 8 bits, as stated; None: to be measured.
        limits: images beyond them are bad.
    """

    max_size: int | None
    quality: int | None
    shard_bytes: int
    format: str
    strict: bool = False
    value_range: ValueRange | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)


class Conversion:
    """Conversion of one source to one folder.

    Runs threads instead of processes: Pillow releases the GIL while it decodes (on 2 cores, 2 threads are as fast as 2
    processes), and threads need no copies, start at once and leave nothing behind after a kill.
    """

    def __init__(self, job: Job, folder: Path, options: Options) -> None:
        self.job = job
        self._destination = Destination(folder)
        self._options = options
        self._keys = member_keys(job.source.key(index) for index in range(len(job.source)))
        self._bounds = shard_bounds(job.source.nbytes, options.shard_bytes)
        self._plan = {
            "source": fingerprint(
                KeyTable.of(self._keys), labels=job.labels, nbytes=job.source.nbytes, classes=job.classes
            ),
            "images": len(job.source),
            "max_size": options.max_size,
            "shard_bytes": options.shard_bytes,
            **({} if options.quality is None else {"quality": options.quality}),
            **({} if options.format == "shards" else {"form": options.format}),
            **({"strict": True} if options.strict else {}),
            **({} if options.value_range is None else {"value_range": str(options.value_range)}),
            **({} if options.limits == ImageLimits() else {"limits": dataclasses.asdict(options.limits)}),
        }
        facts_of(job.source).limits = options.limits
        self._format: Format = TarFormat(self._destination)
        if options.format == "beton":
            self._format = BetonFormat(
                self._destination,
                classes=job.classes,
                capacity=len(job.source),
                page=page_bytes(_largest(job.source)),
                quality=options.quality,
            )
        self._log = WarningLog()
        self._bad = 0  # images of this run
        self._value_range = options.value_range
        self._refused: Mapping[int, str] = {}
        self.finished = False

    def prepare(self, *, overwrite: bool) -> None:
        """Lock the folder; raises before any work if it cannot be used (see `Destination.prepare`)."""
        self.finished = self._destination.prepare(self._plan, overwrite=overwrite)

    def set_values(self, value_range: ValueRange | None, refused: Mapping[int, str]) -> None:
        """Take the measured range of deep images, and index -> reason of those that have none; before `run`."""
        self._value_range, self._refused = value_range, refused

    def release(self) -> None:
        """Unlock the folder of a conversion that is not run."""
        self._destination.release()

    def run(self, *, workers: int) -> str:
        """Convert the images that are not yet converted, and return a summary for the user.

        Raises:
            InputError: every image is bad, the disk is too small, or the source is gone; finished shards are kept.
            OSError: the source cannot be read or the folder not written; finished shards are kept.
        """
        folder = self._destination.folder
        if self.finished:
            count = Manifest.load(folder, formats=FORMATS).count
            return f"{folder} holds all {count} images of this conversion already."
        try:
            found = self._format.load(len(self._bounds) - 1)
            self._check_space(found)
            done = sum(int(self._bounds[n + 1] - self._bounds[n]) for n, state in enumerate(found) if state is not None)
            work = f"converting {self.job.name}".rstrip()
            with (
                self._log.collecting(),
                Progress(Console(stderr=True), work, total=len(self._keys), done=done) as progress,
                ThreadPoolExecutor(workers, thread_name_prefix="mvssl-convert") as pool,
            ):
                states = self._convert(found, pool, workers * _AHEAD, progress)
            self._write_lists(states)
            merged = self._format.merge(states)
            manifest = self._manifest(states, merged)
            self._destination.finish(manifest)
        finally:
            self._destination.release()
        bad, warned, seconds = manifest["quarantined"], manifest["warnings"], progress.seconds
        listed = f" (see {folder / QUARANTINE})" if bad else ""
        damaged = sum(damage != ODD for damage in manifest.get("damage", {}).values())
        told = f" (see {folder / WARNINGS}; {damaged} damaged, which --strict leaves out)" if damaged else ""
        told = told or (f" (see {folder / WARNINGS})" if warned else "")
        return (
            f"{folder}: {manifest['count']} images ({manifest['image_bytes'] / 1e6:.1f} MB) {merged.summary}, "
            f"{bad} quarantined{listed}, {warned} with warnings{told}{self._said_range()}; "
            f"{progress.done_now} images in {seconds:.1f} s, {progress.done_now / seconds:.0f} images/s"
        )

    def _said_range(self) -> str:
        """Part of the summary: the range of deep images."""
        if self._value_range is None:
            return ""
        how = "as stated" if self._options.value_range is not None else "measured"
        return f", deep values {self._value_range} ({how}) as 0..255"

    def _convert(
        self, found: list[ShardState | None], pool: ThreadPoolExecutor, ahead: int, progress: Progress
    ) -> list[ShardState]:
        """States of all shards, of which `found` are finished."""
        todo = [number for number, state in enumerate(found) if state is None]
        indices = (i for number in todo for i in range(int(self._bounds[number]), int(self._bounds[number + 1])))
        images = self._checked(indices, pool, ahead)
        errors = ReadErrors(self.job.source)
        try:
            for number in todo:
                found[number] = self._write_shard(number, images, errors, found[:number], progress)
        except BaseException as error:
            if isinstance(error, SourceGoneError):  # images that could not be read may be good: convert them again
                for number in errors.shards:
                    self._destination.state(number).unlink(missing_ok=True)
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [state for state in found if state is not None]

    def _checked(
        self, indices: Iterable[int], pool: ThreadPoolExecutor, ahead: int
    ) -> Iterator[tuple[int, CheckedImage]]:
        """Checked images in the order of `indices`, at most `ahead` of them in memory."""
        pending: deque[tuple[int, Future[CheckedImage]]] = deque()
        for index in indices:
            pending.append((index, pool.submit(self._check, index)))
            if len(pending) >= ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()

    def _check(self, index: int) -> CheckedImage:
        problem = beyond_bytes(int(self.job.source.nbytes[index]), self._options.limits)
        if problem:
            return CheckedImage(bad=problem)
        data = read(self.job.source, index)
        if isinstance(data, str):
            return CheckedImage(bad=data, unread=True)
        if index in self._refused:
            return CheckedImage(bad=self._refused[index])
        options = self._options
        image = check_image(
            data,
            max_size=options.max_size,
            quality=options.quality,
            strict=options.strict,
            value_range=self._value_range,
            limits=options.limits,
            log=self._log,
        )
        return self._format.adapt(image)

    def _write_shard(
        self,
        number: int,
        images: Iterator[tuple[int, CheckedImage]],
        errors: ReadErrors,
        before: Sequence[ShardState | None],
        progress: Progress,
    ) -> ShardState:
        start, stop = int(self._bounds[number]), int(self._bounds[number + 1])
        rows = np.zeros(stop - start, dtype=INDEX_DTYPE)
        keys: list[str] = []
        bad: list[tuple[str, str]] = []
        warned: list[tuple[str, str]] = []
        damage: list[tuple[int, str]] = []
        checksums: list[int] = []
        writer = self._format.writer(number, before)
        try:
            for _ in range(start, stop):
                index, image = next(images)
                errors.add(image.bad if image.unread else "", shard=number)
                if image.bad:
                    self._bad += 1
                    bad.append((self.job.source.key(index), image.bad))
                else:
                    if image.warned:
                        warned.append((self.job.source.key(index), image.warned))
                    if image.damage is not None:
                        damage.append((len(keys), image.damage))
                    label = int(self.job.labels[index])
                    row = rows[len(keys)]
                    row["offset"] = writer.add(self._keys[index], image, label=label)
                    row["size"], row["label"] = len(image.data), label
                    row["height"], row["width"] = image.height, image.width
                    keys.append(self._keys[index])
                    checksums.append(image.checksum)
                progress.add(note=f"{self._bad} bad")
            shard = writer.finish() if keys else None
        finally:
            writer.discard()  # has no effect on a finished shard
        state = ShardState(
            shard=shard,
            rows=rows[: len(keys)],
            keys=keys,
            bad=bad,
            warned=warned,
            checksums=checksums,
            damage=damage if can_find_damage() else None,
        )
        state.save(self._destination.state(number))
        return state

    def _check_space(self, found: list[ShardState | None]) -> None:
        if self._options.max_size is not None or self._options.quality is not None:
            return  # the sizes are not yet known
        needed = 0
        for number, state in enumerate(found):
            if state is None:
                sizes = self.job.source.nbytes[self._bounds[number] : self._bounds[number + 1]]
                needed += int(sizes.sum()) + _MEMBER_BYTES * len(sizes)
        usage = shutil.disk_usage(self._destination.folder)
        if usage.total > 0 and usage.free < needed:
            raise InputError(
                f"DST {self._destination.folder} has {usage.free / 1e9:.1f} GB free but the conversion needs "
                f"{needed / 1e9:.1f} GB: free some space, give a DST on another disk, or make images smaller with "
                "--max-size."
            )

    def _write_lists(self, states: Sequence[ShardState]) -> None:
        """Write quarantine.jsonl and warnings.jsonl; raises InputError if every image is bad."""
        folder = self._destination.folder
        bad = [item for state in states for item in state.bad]
        warned = [item for state in states for item in state.warned]
        write_whole(folder / QUARANTINE, _json_lines(bad, "reason"))
        write_whole(folder / WARNINGS, _json_lines(warned, "warning"))
        if not any(len(state.rows) for state in states):
            raise InputError(
                f"none of the {len(bad)} images of {self.job.source.location} can be used, the first because of: "
                f"{bad[0][1]} ({bad[0][0]}); see {folder / QUARANTINE} and give images that can be decoded."
            )

    def _manifest(self, states: Sequence[ShardState], merged: Merged) -> dict[str, Any]:
        rows = np.concatenate([state.rows for state in states])
        keys = KeyTable.of(key for state in states for key in state.keys)
        labels = rows["label"].astype(np.int64)
        classes = self.job.classes
        return {
            "format": merged.format,
            "version": VERSION,
            "count": len(rows),
            "quarantined": sum(len(state.bad) for state in states),
            "warnings": sum(len(state.warned) for state in states),
            "image_bytes": int(rows["size"].sum()),
            "fingerprint": fingerprint(keys, labels=labels, nbytes=rows["size"], classes=classes),
            "source": str(self.job.source.location),
            "plan": self._plan,
            "versions": {
                "python": platform.python_version(),
                **{name: _version(name) for name in ("mvssl", "numpy", "pillow")},
            },
            "sha256": dict(merged.sha256),
            "shards": [dataclasses.asdict(shard) for shard in merged.shards],
            "classes": list(classes),
            "class_counts": np.bincount(labels[labels >= 0], minlength=len(classes)).tolist(),
            **_damage(states),
            **({} if self._value_range is None else {"value_range": str(self._value_range)}),
        }


def shard_bounds(nbytes: npt.NDArray[np.int64], shard_bytes: int) -> npt.NDArray[np.int64]:
    """Bounds of the shards, int64 [shards + 1]: shard s holds images bounds[s] to bounds[s + 1] - 1.

    A shard ends before the image (int64 [N] sizes in bytes) that would take it above `shard_bytes`; a larger image gets
    a shard of its own.
    """
    bounds = [0]
    filled = 0
    for index, size in enumerate(nbytes.tolist()):
        if filled > 0 and filled + size > shard_bytes:
            bounds.append(index)
            filled = 0
        filled += size
    return np.array([*bounds, len(nbytes)], dtype=np.int64)


def _largest(source: Source) -> int:
    """Bytes that no image exceeds."""
    return source.largest if isinstance(source, FormSource) else int(np.max(source.nbytes, initial=0))


def _damage(states: Sequence[ShardState]) -> dict[str, dict[int, str]]:
    """Entry of the manifest: damage of stored images by index; none unless all were examined."""
    damage: dict[int, str] = {}
    first = 0
    for state in states:
        if state.damage is None:
            return {}
        damage.update((first + row, text) for row, text in state.damage)
        first += len(state.rows)
    return {"damage": damage}


def _json_lines(items: Iterable[tuple[str, str]], name: str) -> str:
    return "".join(json.dumps({"key": key, name: text}) + "\n" for key, text in items)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
