"""Opens the images of a run on all of its ranks, whatever form they are given in, and checks that they are alike."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mvssl.config.options import RunOptions
from mvssl.distributed import World
from mvssl.runs.folder import RunFolder
from pipelines.decode import ImageLimits
from pipelines.loading.deep_images import state_value_range
from pipelines.progress import Progress
from pipelines.runtime import InputError
from pipelines.storage import RemoteOptions, open_source, split_paths
from pipelines.storage.folder import forget_changed_index
from pipelines.storage.given import source_of
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source
from pipelines.value_range import FULL, ValueRange, parse_value_range


def data_paths(
    data: Path, val: Path | None, world: World, *, remote: RemoteOptions | None = None
) -> tuple[Path, Path | None]:
    """Paths of the training images and, if there are any, of the validation images."""
    failure: Exception | None = None
    train = data
    try:
        train, found = split_paths(data, remote=remote)
        val = val or found
    except (InputError, OSError) as error:
        failure = error
    first, *_ = has_val = world.gather_objects(val is not None)  # collective: a failing rank must take part
    if failure is not None:
        raise failure
    if has_val[world.rank] != first:
        raise InputError(
            f"data is {str(data)!r}, which has {'no' if first else 'a'} validation part on rank {world.rank} but "
            f"{'one' if first else 'none'} on rank 0: give every machine the same data set."
        )
    return train, val


def stated_range(options: RunOptions) -> ValueRange | None:
    """The range that the options state, or that of the run that is resumed.

    Raises:
        InputError: both, and they differ.
    """
    stated = None if options.value_range is None else parse_value_range(options.value_range)
    if not options.resume or options.out is None:
        return stated
    text = RunFolder(options.out).options().get("value_range")
    begun = None if text is None else parse_value_range(text)
    if stated is not None and stated != (begun or FULL):  # without a range, images used all their 16 bits
        how = "without one" if begun is None else f"with {str(begun)!r}"
        raise InputError(
            f"value_range is {str(stated)!r} but the run in {options.out} was started {how}: leave --value-range out, "
            "or start a new run with another --out.",
            field="value_range",
        )
    return stated or begun


def check_same_range(source: Source, val: Source) -> None:
    """Check that deep images of both are scaled alike."""
    first, second = facts_of(source).value_range, facts_of(val).value_range
    if first is not None and second not in (None, first):
        raise InputError(
            f"val is {str(val.location)!r}, whose values {second} become 0..255, but those of {source.location} are "
            f"{first}: convert both with the same --value-range.",
            field="val",
        )


def open_run_images(
    data: object,
    console: Console,
    world: World,
    *,
    stated: ValueRange | None,
    default: ValueRange | None = None,
    limits: ImageLimits,
    remote: RemoteOptions | None = None,
    field: str = "data",
) -> Source:
    """Open images; rank 0 indexes a folder first, the others then find its index in the cache.

    A cached index does not show that images were replaced in place, so the first rank of a host compares sizes. What is
    no path is opened by all ranks at once.
    """
    path = data if isinstance(data, Path) else None
    if path is not None and world.local_rank == 0:
        forget_changed_index(path)

    def opened() -> Source:
        if path is None:
            source = source_of(data, field=field, progress=Progress(console, f"indexing {field}").update)
        else:
            source = open_source(path, progress=Progress(console, f"indexing {path}").update, remote=remote)
        state_value_range(source, stated, default=default, limits=limits)
        return source

    return world.run_on_all(opened) if path is None else world.run_on_rank0_first(opened)


def check_same_images(source: Source, world: World) -> None:
    """Check that all ranks see the same images."""
    first = world.run_on_rank0(lambda: source.fingerprint)

    def compare() -> None:
        if source.fingerprint != first:
            raise InputError(
                f"data is {str(source.location)!r}, which holds other images on rank {world.rank} than on rank 0 "
                "(their names, sizes or labels differ): give every machine the same data set."
            )

    world.run_on_all(compare)
