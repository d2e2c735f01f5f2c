"""Convert a source, whatever the form: parallel, resumable, the same bytes every time."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.conversion.beton_writer import BetonForm
from pipelines.conversion.destination import Destination
from pipelines.conversion.progress import ConversionProgress
from pipelines.conversion.shard_state import Form, Origin, Part, save_part
from pipelines.conversion.sources import Job, member_keys
from pipelines.conversion.tar_writer import TarForm
from pipelines.conversion.verify import Checked, SourceGoneError, UnreadableRow, WarningLog, check, read
from pipelines.runtime import InputError
from pipelines.storage.beton_format import page_bytes
from pipelines.storage.manifest import FORMATS, INDEX_DTYPE, QUARANTINE, Manifest
from pipelines.storage.source import KeyTable, fingerprint

_AHEAD = 4  # images in flight per worker: enough that a slow one does not stop the others
_MEMBER_BYTES = 2048  # at most, around one image: two headers, padding and the label


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the converted bytes.

    Attributes:
        max_size: longest side in pixels; None: as they are.
        quality: of the JPEGs that all images become; None: bytes pass through where they can.
        shard_bytes: bytes of images in one part.
        form: "shards" or "beton".
    """

    max_size: int | None
    quality: int | None
    shard_bytes: int
    form: str


class Conversion:
    """One source on its way into one folder.

    Threads, not processes: Pillow releases the interpreter lock while it decodes (on 2 cores, 2 threads and 2 processes
    convert equally fast), and threads need no copies, no start-up and leave nothing behind after a kill.
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
            **({} if options.form == "shards" else {"form": options.form}),
        }
        origin = Origin(classes=job.classes, plan=self._plan, source=str(job.source.location))
        self._form: Form = TarForm(self._destination, origin)
        if options.form == "beton":
            self._form = BetonForm(
                self._destination,
                origin,
                capacity=len(job.source),
                page=page_bytes(int(np.max(job.source.nbytes, initial=0))),
                quality=options.quality,
            )
        self._log = WarningLog()
        self._finished = False

    def prepare(self, *, overwrite: bool) -> None:
        """Claim the folder; raises before any work is done if it cannot be used (see `Destination.prepare`)."""
        self._finished = self._destination.prepare(self._plan, overwrite=overwrite)

    def run(self, *, workers: int) -> str:
        """Convert what is not converted yet and return the summary for the user.

        Raises:
            InputError: every image is bad, the disk is too small, or the source has gone; finished shards are kept.
            OSError: the source cannot be read or the destination not written; finished shards are kept.
        """
        folder = self._destination.folder
        if self._finished:
            count = Manifest.load(folder, formats=FORMATS).count
            return f"{folder} holds all {count} images of this conversion already."
        try:
            found = self._form.load(len(self._bounds) - 1)
            self._check_space(found)
            done = sum(int(self._bounds[n + 1] - self._bounds[n]) for n, part in enumerate(found) if part is not None)
            title = f"converting {self.job.name}".rstrip()
            with (
                self._log.collecting(),
                ConversionProgress(title, total=len(self._keys), finished=done) as progress,
                ThreadPoolExecutor(workers, thread_name_prefix="mvssl-convert") as pool,
            ):
                parts = self._convert(found, pool, workers * _AHEAD, progress)
            manifest = self._form.join(parts)
        finally:
            self._destination.release()
        quarantined = f", {manifest['quarantined']} quarantined" + (
            f" (see {folder / QUARANTINE})" if manifest["quarantined"] else ""
        )
        return (
            f"{folder}: {manifest['count']} images ({manifest['image_bytes'] / 1e6:.1f} MB) "
            f"{self._form.describe(manifest)}{quarantined}, {manifest['warnings']} with warnings; "
            f"{progress.this_run} images in {progress.seconds:.1f} s, {progress.rate:.0f} images/s"
        )

    def _convert(
        self, found: list[Part | None], pool: ThreadPoolExecutor, ahead: int, progress: ConversionProgress
    ) -> list[Part]:
        todo = [number for number, part in enumerate(found) if part is None]
        indices = (i for number in todo for i in range(int(self._bounds[number]), int(self._bounds[number + 1])))
        outcomes = self._in_order(indices, pool, ahead)
        unreadable = UnreadableRow(str(self.job.source.location))
        try:
            for number in todo:
                found[number] = self._write_part(number, outcomes, unreadable, found, progress)
                unreadable.end_shard(number)
        except SourceGoneError:
            for number in unreadable.shards:  # their images may well be good: to be converted again
                self._destination.part(number).unlink()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [part for part in found if part is not None]

    def _in_order(self, indices: Iterable[int], pool: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[int, Checked]]:
        """Results in the order of `indices`, with at most `ahead` of them in memory."""
        pending: deque[tuple[int, Future[Checked]]] = deque()
        for index in indices:
            pending.append((index, pool.submit(self._check, index)))
            if len(pending) >= ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()

    def _check(self, index: int) -> Checked:
        data = read(self.job.source, index)
        if isinstance(data, str):
            return Checked(bad=data, unread=True)
        options = self._options
        return self._form.suit(check(data, max_size=options.max_size, quality=options.quality, log=self._log))

    def _write_part(
        self,
        number: int,
        outcomes: Iterator[tuple[int, Checked]],
        unreadable: UnreadableRow,
        found: Sequence[Part | None],
        progress: ConversionProgress,
    ) -> Part:
        start, stop = int(self._bounds[number]), int(self._bounds[number + 1])
        rows = np.zeros(stop - start, dtype=INDEX_DTYPE)
        keys: list[str] = []
        bad: list[tuple[str, str]] = []
        warned: list[tuple[str, str]] = []
        writer = self._form.writer(number, found[:number])
        try:
            for _ in range(start, stop):
                index, outcome = next(outcomes)
                progress.advance(bad=bool(outcome.bad))
                unreadable.add(outcome.bad if outcome.unread else "")
                if outcome.bad:
                    bad.append((self.job.source.key(index), outcome.bad))
                    continue
                if outcome.warned:
                    warned.append((self.job.source.key(index), outcome.warned))
                label = int(self.job.labels[index])
                offset = writer.add(self._keys[index], outcome, label=label)
                row = rows[len(keys)]
                row["offset"], row["size"], row["label"] = offset, len(outcome.data), label
                row["height"], row["width"] = outcome.height, outcome.width
                keys.append(self._keys[index])
            shard = writer.finish() if keys else None
        finally:
            writer.discard()  # nothing is left to discard once it is finished
        part = Part(shard=shard, rows=rows[: len(keys)], keys=keys, bad=bad, warned=warned)
        save_part(self._destination.part(number), part)
        return part

    def _check_space(self, found: list[Part | None]) -> None:
        if self._options.max_size is not None or self._options.quality is not None:
            return  # sizes are not known before
        needed = 0
        for number, part in enumerate(found):
            if part is None:
                sizes = self.job.source.nbytes[self._bounds[number] : self._bounds[number + 1]]
                needed += int(sizes.sum()) + _MEMBER_BYTES * len(sizes)
        usage = shutil.disk_usage(self._destination.folder)
        if usage.total > 0 and usage.free < needed:
            raise InputError(
                f"DST {self._destination.folder} has {usage.free / 1e9:.1f} GB free but the conversion needs "
                f"{needed / 1e9:.1f} GB: free some space, give a DST on another disk, or make images smaller with "
                "--max-size."
            )


def shard_bounds(nbytes: npt.NDArray[np.int64], shard_bytes: int) -> npt.NDArray[np.int64]:
    """Which images go into which shard: int64 [shards + 1], shard s holds images bounds[s] to bounds[s + 1] - 1.

    A shard is closed before the image (int64 [N] sizes in bytes) that would take it above `shard_bytes`; one image
    larger than that gets a shard of its own.
    """
    bounds = [0]
    filled = 0
    for index, size in enumerate(nbytes.tolist()):
        if filled > 0 and filled + size > shard_bytes:
            bounds.append(index)
            filled = 0
        filled += size
    return np.array([*bounds, len(nbytes)], dtype=np.int64)
