"""mvssl-features: the features of any images, as .npy or Parquet."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mvssl.config.evaluation import BackboneSource, ComputeOptions
from mvssl.ranks import exit_code_of_rank
from pipelines.loading.deep_images import pixels_of
from pipelines.runtime import InputError, parse_arguments, run_cli

if TYPE_CHECKING:  # with torch, which takes seconds and help does not need
    from mvssl.evaluate.session import BackboneSession


@dataclass(frozen=True, kw_only=True)
class FeatureArguments:
    """Write the features of the centre crop of every image, with keys and labels.

    If stopped, the same command resumes from OUT.partial. Images that cannot be decoded are left out and named.

    Attributes:
        images: a folder of images, a list of files, tars, zips, Parquet or Arrow files, or converted data; labels are
            not needed.
        out: the file to write: .npy (with a .csv of keys and labels) or .parquet.
        source: which backbone.
        compute: where and how features are computed.
        dtype: of the features.
        overwrite: replace an existing OUT.
    """

    images: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="IMAGES")]]
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    source: Annotated[BackboneSource, tyro.conf.arg(name="")]
    compute: Annotated[ComputeOptions, tyro.conf.arg(name="")] = field(default_factory=ComputeOptions)
    dtype: Literal["float16", "float32"] = "float32"
    overwrite: bool = False


def body(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    asked = parse_arguments(FeatureArguments, prog="mvssl-features", args=arguments)
    return exit_code_of_rank(lambda: _write(asked))


def _write(asked: FeatureArguments) -> None:
    from mvssl.evaluate.feature_store import check_ending
    from mvssl.evaluate.session import open_backbone
    from mvssl.runs.results import locked_folder

    check_ending(asked.out)
    partial = asked.out.with_name(f"{asked.out.name}.partial")
    if asked.out.exists() and not asked.overwrite and not partial.exists():  # both: stopped just before the end
        raise InputError(f"OUT is {str(asked.out)!r}, which exists: add --overwrite to replace it, or choose another.")
    with (
        open_backbone(asked.source, asked.compute) as session,
        locked_folder(partial) if session.world.is_rank0 else nullcontext(),
    ):
        _compute(asked, session, partial)


def _compute(asked: FeatureArguments, session: BackboneSession, partial: Path) -> None:
    from mvssl.evaluate.feature_store import write_table
    from mvssl.evaluate.features import compute_store
    from mvssl.evaluate.session import interpolated, open_images
    from mvssl.runs.results import describe

    source = open_images(asked.images, session)
    evaluation = session.loaded.evaluation
    identity = {
        "weights": session.loaded.digest,
        "data": pixels_of(source),
        "resize": evaluation.resize,
        "crop": evaluation.crop,
        "precision": str(session.autocast),
        **interpolated(evaluation),
    }
    store = compute_store(session, source, partial / "store", identity, dtype=asked.dtype, overwrite=asked.overwrite)
    written = session.world.run_on_rank0(lambda: write_table(asked.out, store, source))
    if session.world.is_rank0:
        shutil.rmtree(partial, ignore_errors=True)
    left = f", {len(source) - written} left out" if written < len(source) else ""
    session.say(f"{asked.out}: {written:,} images, {session.width} features each{left}")
    session.say(f"{session.loaded.architecture}, {describe(session.conditions())}")
    source.close()


def main() -> None:
    """Console script."""
    sys.exit(run_cli(lambda: body(sys.argv[1:])))


if __name__ == "__main__":
    main()
