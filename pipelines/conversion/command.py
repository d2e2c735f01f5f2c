"""`mvssl-convert`: converts images in any of the usual forms to tar shards or an FFCV file."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from pipelines.conversion.conversion import Conversion, Options
from pipelines.conversion.sources import describe, find_jobs
from pipelines.conversion.value_measure import measure_jobs
from pipelines.decode.base import MOST_THREADS
from pipelines.decode.limits import ImageLimits
from pipelines.names import Url, located, visible
from pipelines.progress import Progress
from pipelines.runtime import InputError, invalid, parse_arguments, run_cli
from pipelines.storage import RemoteOptions, open_source
from pipelines.storage.beton_format import BETON, is_beton_name
from pipelines.storage.deep_sample import warn_if_black_or_white
from pipelines.storage.forms import Request
from pipelines.storage.image_facts import facts_of
from pipelines.storage.shards import ShardSource
from pipelines.value_range import parse_value_range

_LARGEST_SHARD = 10**9  # MB
_MEGABYTE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert images to tar shards with an index: few large files, random access, readable by tar and WebDataset.
    Or to a .beton file, which FFCV reads.

    Every image is decoded once; images that cannot be decoded are left out and listed in quarantine.jsonl with the
    reason. After an interruption the same command resumes the conversion.
    """

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A folder of images (labels are its first level of folders), a folder with train/ and val/, a text list of files,
    or data as downloaded, read in place: Parquet, a data set saved by `datasets`, WebDataset and other tars, zip,
    ImageNet's archives (also Kaggle's), CIFAR, STL-10, MNIST, HDF5, LMDB, TFRecord, converted data. Files, folders of
    them, and patterns in quotes: "train-{000..099}.tar". Tars, zips, Parquet and converted data also at a URL (s3://,
    gs://, hf://, https://)."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """New or empty folder to write to; DST/train and DST/val if SRC has both."""
    format: Literal["shards", "beton"] = "shards"
    """Tar shards and their index, or one images.beton, which FFCV also reads."""
    max_size: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Longest side in pixels: larger images are scaled down and encoded again (JPEG, quality 95 or --quality); needed
    for those beyond --limits.pixels, which are read up to twice that size, JPEGs at any size. Without it, bytes pass
    through unchanged (in .beton only of gray and RGB JPEGs; other images are stored as pixels)."""
    quality: Annotated[int | None, tyro.conf.arg(metavar="Q", help_behavior_hint="(default: bytes pass through)")] = (
        None
    )
    """Encode every image again as JPEG of this quality, 1 to 100."""
    shard_size: Annotated[float, tyro.conf.arg(metavar="MB")] = 512.0
    """MB of images per shard; a kill loses at most one shard's work. (In .beton: the work between two saves.)"""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one per core)")] = None
    """Threads that read and check images."""
    val_labels: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """For ILSVRC2012_img_val.tar: one wnid per line in the order of the file names, or lines of NAME WNID (also
    LOC_val_solution.csv); integers in place of wnids need --classes."""
    classes: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """All classes, one per line: labels are numbered by their sorted order, and integers in --val-labels count by their
    order in this file."""
    image: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: found by content)")] = None
    """Which images, where SRC has several: a column (Parquet, Arrow), component (WebDataset: png), data set (HDF5),
    key (LMDB, TFRecord) or variant (EMNIST: letters)."""
    label: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: found by name)")] = None
    """Which labels: a column, component, data set or key; coarse of CIFAR-100; none for images without labels."""
    split: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: all)")] = None
    """Convert only this split of SRC (train, val, test, ...), into DST itself."""
    strict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Quarantine JPEGs that decode although their data are damaged (parts of them are gray or torn). Otherwise they are
    stored, and listed in warnings.jsonl."""
    value_range: Annotated[str, tyro.conf.arg(metavar="auto|MIN..MAX")] = "auto"
    """Values that become 0..255 in images of more than 8 bits; those outside are clamped. auto takes the fewest of 8,
    10, 12, 14 and 16 bits that hold every value of all these images."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read the converted data back and compare the checksum of every image. With the command of a finished conversion,
    only this is done. (Training compares them, too, whenever it reads an image.)"""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """Images beyond these limits are quarantined."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Remove converted data from DST and start again."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    """How SRC at a URL is read and cached."""


def convert(config: Convert) -> None:
    """Convert every split and print one summary line for each.

    Raises:
        InputError: an option, SRC or DST cannot be used.
        OSError: reading or writing failed; finished shards are kept.
    """
    if config.max_size is not None and config.max_size < 1:
        raise invalid("--max-size", config.max_size, "1 or more pixels", "give the longest side, e.g. 512")
    if config.quality is not None and not 1 <= config.quality <= 100:
        raise invalid("--quality", config.quality, "1 to 100", "95 is close to the original, 75 small")
    if config.format == "beton" and is_beton_name(config.dst):
        raise InputError(f"DST {config.dst} is the name of a file: give a folder; {BETON} is written in it.")
    if not 0 < config.shard_size <= _LARGEST_SHARD:
        raise invalid(
            "--shard-size", config.shard_size, f"above 0 and at most {_LARGEST_SHARD:,} MB", "give megabytes, e.g. 512"
        )
    if config.workers is not None and not 1 <= config.workers <= MOST_THREADS:
        raise invalid("--workers", config.workers, f"1 to {MOST_THREADS}", "give a number of threads or leave it out")
    src = located(config.src)
    if isinstance(located(config.dst), Url):
        raise InputError(
            f"DST is {str(located(config.dst))!r} but must be a folder of this machine: convert there and copy it."
        )
    if src.exists() and config.dst.resolve().is_relative_to(src.resolve()):
        raise InputError(f"DST {config.dst} lies in SRC {config.src}: give a DST outside of it.")
    workers = config.workers or _cores()
    options = Options(
        max_size=config.max_size,
        quality=config.quality,
        shard_bytes=max(1, round(config.shard_size * _MEGABYTE)),
        format=config.format,
        strict=config.strict,
        value_range=None if config.value_range == "auto" else parse_value_range(config.value_range),
        limits=config.limits,
    )
    progress = Progress(Console(stderr=True), f"indexing {src}").update
    jobs = find_jobs(
        src,
        val_labels=config.val_labels,
        classes_file=config.classes,
        request=Request(image=config.image, label=config.label, progress=progress),
        split=config.split,
        remote=config.remote,
    )
    print(visible(describe(src, jobs)), flush=True)
    try:
        conversions = [Conversion(job, config.dst / job.name, options) for job in jobs]
        for conversion in conversions:  # all before the first runs, so that no error comes after hours
            conversion.prepare(overwrite=config.overwrite)
        if options.value_range is None and not all(conversion.finished for conversion in conversions):
            _measure(conversions, workers, reduced=options.max_size is not None)
        if options.value_range is not None:
            for job in jobs:
                warn_if_black_or_white(job.source, options.value_range)
        for conversion in conversions:
            print(visible(conversion.run(workers=workers)), flush=True)
    finally:
        for job in jobs:
            job.source.close()
    if config.verify:
        for job in jobs:
            print(visible(verify(config.dst / job.name)), flush=True)


def _measure(conversions: Sequence[Conversion], workers: int, *, reduced: bool) -> None:
    """Find the range of values for all splits, of which smaller versions are wanted if `reduced`."""
    progress = Progress(Console(stderr=True), "measuring the values of deep images").update
    try:
        jobs = [conversion.job for conversion in conversions]
        values = measure_jobs(jobs, workers=workers, reduced=reduced, progress=progress)
    except BaseException:
        for conversion in conversions:
            conversion.release()
        raise
    for conversion, refused in zip(conversions, values.refused, strict=True):
        conversion.set_values(values.value_range, refused)


def verify(folder: Path) -> str:
    """Read converted data and compare the checksum of every image; a sentence for the user.

    Raises:
        InputError: images are damaged; the message names the first ones.
        OSError: the disk fails.
    """
    source = open_source(folder)
    sums = facts_of(source).checksums
    if sums is None and isinstance(source, ShardSource):  # converted by an earlier version
        source.verify()
        return f"{folder}: the shards have their checksums."
    if sums is None:
        raise InputError(f"{folder} has no checksums (converted by an earlier version): convert it again.")
    with Progress(Console(stderr=True), f"verifying {folder}", total=len(source)) as progress:
        damaged = []
        for index in range(len(source)):
            if zlib.crc32(source.read(index).data) != sums[index]:
                damaged.append(source.key(index))
            progress.add(note=f"{len(damaged)} damaged")
    if damaged:
        raise InputError(
            f"{folder} has {len(damaged)} damaged images of {len(source)} ({', '.join(damaged[:3])}"
            f"{', ...' if len(damaged) > 3 else ''}): restore it from where it was copied, or convert again with "
            "--overwrite."
        )
    return f"{folder}: all {len(source)} images have their checksums."


def _cores() -> int:
    # Cores of this process: a container often has fewer than the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `mvssl-convert`; exits the process."""
    run_cli(lambda: convert(parse_arguments(Convert, args=arguments, prog="mvssl-convert")))


if __name__ == "__main__":
    main()
