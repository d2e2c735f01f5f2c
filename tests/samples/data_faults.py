"""Data sets in every storage format, and damage to them at a known moment of a run."""

from __future__ import annotations

import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipelines.loader
import pipelines.storage.beton
import pipelines.storage.folder
import pipelines.storage.shards
from mvssl.config.recipe import Recipe
from mvssl.evaluate import online_knn
from mvssl.runs import checkpoint
from mvssl.training import loop
from pipelines.conversion.command import Convert, convert
from pipelines.loading import fetch
from pipelines.order import Order
from pipelines.storage import batch_read, open_source

CONVERTED = ("shards", "beton")
FORMS = ("folder", *CONVERTED)
EPOCH, STEP = 1, 2  # of the first batch after the damage, in runs of 4 steps an epoch:
DAMAGED, SAVED = 6, 4  # batch 6 of the run; the last checkpoint is that of step 4


def write_forms(images: Path, base: Path) -> dict[str, Path]:
    """Convert images to every storage format, a dozen images a shard; the data sets by format."""
    convert(Convert(src=images, dst=base / "shards", shard_size=0.02))
    convert(Convert(src=images, dst=base / "beton", format="beton", shard_size=0.02))
    return {"folder": images, "shards": base / "shards", "beton": base / "beton"}


def copy_of(data: Path, to: Path) -> Path:
    """Copy a data set, to be damaged."""
    shutil.copytree(data, to / "data")
    return to / "data"


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A training image to damage: dataset index, key, encoded bytes, and the file and offset of these."""

    index: int
    key: str
    image: bytes
    path: Path
    offset: int

    def overwrite(self, broken: bytes) -> None:
        """Overwrite the image. A file with only this image takes the size of `broken`, a shard keeps its size."""
        content = self.path.read_bytes()
        same_size = broken[: len(self.image)].ljust(len(self.image), b"\0")
        self.path.write_bytes(broken if content == self.image else content.replace(self.image, same_size))


def victims(data: Path, recipe: Recipe, count: int = 1, *, spared: tuple[str, ...] = ()) -> list[Victim]:
    """The first images after the damage, in the order of the run, without those whose stems are spared."""
    source = open_source(data / "train")
    order = Order(num_images=len(source), batch_size=recipe.batch_size, seed=recipe.seed).permutation(EPOCH)
    found: list[Victim] = []
    for index in order[STEP * recipe.batch_size :].tolist():
        key, image = source.key(index), source.read(index).tobytes()
        if len(found) < count and Path(key).stem not in spared:
            path = next(path for path in sorted((data / "train").rglob("*.*")) if image in path.read_bytes())
            offset = path.read_bytes().index(image)
            found.append(Victim(index=index, key=key, image=image, path=path, offset=offset))
    source.close()
    return found


@contextmanager
def first_evaluation() -> Iterator[threading.Event]:
    """An event that is set after the first epoch's kNN, at step 4; the loader's threads are ahead of the step."""
    over = threading.Event()

    def evaluate_online(*arguments: Any, **options: Any) -> online_knn.OnlineAccuracy:
        accuracy = online_knn.evaluate_online(*arguments, **options)
        over.set()
        return accuracy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_online", evaluate_online)
        yield over


@contextmanager
def before_batch(damage: Callable[[], object]) -> Iterator[list[list[int]]]:
    """Call `damage` in the loader's thread before it reads batch DAMAGED, once the first evaluation is over.

    Yields a list that grows by the dataset indices of each decoded batch.
    """
    read: list[None] = []
    prepared: list[list[int]] = []

    def usable_indices(*arguments: Any, **options: Any) -> Any:
        if len(read) == DAMAGED:
            assert over.wait(60)
            damage()
        read.append(None)
        return fetch.usable_indices(*arguments, **options)

    def fetch_complete(*arguments: Any, **options: Any) -> Any:
        complete = fetch.fetch_complete(*arguments, **options)
        prepared.append(complete.batch.index.tolist())
        return complete

    with first_evaluation() as over, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.loader, "usable_indices", usable_indices)
        patch.setattr(pipelines.loader, "fetch_complete", fetch_complete)
        yield prepared


@contextmanager
def before_second_evaluation(damage: Callable[[], object]) -> Iterator[None]:
    """Call `damage` when the second epoch's kNN starts, at step 8."""
    calls: list[None] = []

    def evaluate_online(*arguments: Any, **options: Any) -> online_knn.OnlineAccuracy:
        calls.append(None)
        if len(calls) == 2:
            damage()
        return online_knn.evaluate_online(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_online", evaluate_online)
        yield


@contextmanager
def disk(fault: Callable[[Path, int], object]) -> Iterator[None]:
    """Call `fault` with file and offset before each read of an image: it sleeps, or raises as the disk would."""
    fromfile, preadv = np.fromfile, os.preadv
    read_files, read_ranges = batch_read.read_files, batch_read.read_ranges

    def reading_files(file: Any, *arguments: Any, **options: Any) -> Any:
        fault(Path(file), 0)
        return fromfile(file, *arguments, **options)

    def reading_places(descriptor: int, buffers: Any, offset: int) -> int:
        fault(Path(os.readlink(f"/proc/self/fd/{descriptor}")), offset)
        return preadv(descriptor, buffers, offset)

    def fails(path: Path, offset: int) -> bool:
        try:
            fault(path, offset)
        except OSError:
            return True
        return False

    def many_files(paths: Any, nbytes: Any, **options: Any) -> Any:
        bad = [fails(Path(path), 0) for path in paths]
        return [
            None if failed else data for failed, data in zip(bad, read_files(paths, nbytes, **options), strict=True)
        ]

    def many_places(descriptors: Any, offset: Any, size: Any, **options: Any) -> Any:
        paths = [Path(os.readlink(f"/proc/self/fd/{descriptor}")) for descriptor in descriptors]
        bad = [fails(path, at) for path, at in zip(paths, offset.tolist(), strict=True)]
        data = read_ranges(descriptors, offset, size, **options)
        return [None if failed else one for failed, one in zip(bad, data, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "fromfile", reading_files)  # a folder's images, one by one
        patch.setattr(os, "preadv", reading_places)
        patch.setattr(pipelines.storage.folder, "read_files", many_files)
        patch.setattr(pipelines.storage.shards, "read_ranges", many_places)
        patch.setattr(pipelines.storage.beton, "read_ranges", many_places)
        yield


def last_step(out: Path) -> int:
    """Step of the last checkpoint, which must load."""
    return int(checkpoint.load(out / "checkpoints" / "last").meta["step"])


def log(out: Path) -> str:
    return (out / "train.log").read_text()


@contextmanager
def limited_files(limit: int) -> Iterator[None]:
    """Let writes fail above `limit` bytes per file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
