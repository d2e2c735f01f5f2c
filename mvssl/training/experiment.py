"""Everything a run is made of, built from a recipe and options: data, order, loader and training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from mvssl.config.options import RunOptions, resolve_device
from mvssl.config.recipe import Recipe
from mvssl.distributed import World
from mvssl.evaluate.online_knn import check_knn_data
from mvssl.monitor.console import indexing_progress
from mvssl.training.compile import keep_compiled_code
from mvssl.training.cuda_graph import wants_capture
from mvssl.training.memory import peak_step_memory
from mvssl.training.step import TrainStep
from pipelines.loader import Loader
from pipelines.loading.pixel_cache import Cache, KeptSource, free_memory, keep_decoded
from pipelines.order import Order
from pipelines.runtime import InputError
from pipelines.storage import open_source, split_paths
from pipelines.storage.source import Source


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The parts of a run.

    Attributes:
        recipe: what decides the numbers.
        options: where to read and how to report.
        device: where the step runs.
        source: the training images.
        val: the validation images, if any.
        order: which image comes when.
        loader: batches of views in that order.
        step: one optimiser update.
        world: the ranks that train together.
        cache: in a sentence, where decoded images are kept; "" without a cache.
    """

    recipe: Recipe
    options: RunOptions
    device: torch.device
    source: Source
    val: Source | None
    order: Order
    loader: Loader
    step: TrainStep
    world: World
    cache: str = ""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.recipe.epochs * self.order.steps_per_epoch

    @property
    def evaluates(self) -> bool:
        """Whether the run computes kNN: it is asked for and there are labels."""
        return self.recipe.evaluation.every_epochs > 0 and labelled(self.source, self.val)


def labelled(*sources: Source | None) -> bool:
    """Whether every image of every source has a label."""
    return all(bool((source.labels >= 0).all()) for source in sources if source is not None)


@contextmanager
def open_experiment(recipe: Recipe, options: RunOptions, console: Console, world: World) -> Iterator[Experiment]:
    """Build the parts of a run on this rank and close them at the end.

    Raises:
        InputError: a path, a size or a combination cannot be used; the message says which and what to do.
    """
    if options.data is None:
        raise InputError("data is missing: give the folder of images, or a converted data set, with --data PATH.")
    device = resolve_device(options.device, local_rank=world.local_rank if world.size > 1 else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # "cuda:1" is where all streams, recordings and allocations belong
    keep_compiled_code()
    with ExitStack() as stack:
        train_path, val_path = world.together(partial(_paths, options.data, options.val, world))
        source = _open(train_path, console, world)
        stack.callback(source.close)
        val = None
        if val_path is not None:
            val = _open(val_path, console, world)
            stack.callback(val.close)
            _check_same_data(val, world)
        _check_same_data(source, world)
        order = world.together(partial(_order, recipe, source, val, world))
        peak = world.together(partial(_peak, recipe, options, device, world))
        step = TrainStep(
            recipe,
            device=device,
            total_steps=recipe.epochs * order.steps_per_epoch,
            steps_per_epoch=order.steps_per_epoch,
            world=world,
            cuda_graph=options.cuda_graph,
        )
        steps = (
            max(0, peak - torch.cuda.memory_reserved(device)) if peak else 0
        )  # without the networks, which are there
        keep = partial(_keep, device=device, console=console, world=world, steps=steps)
        source, cache = world.together(partial(keep, source, options.cache))
        if val is not None and options.cache != "off":  # where there is room: who names a place means training's
            taken = source.store.nbytes if isinstance(source, KeptSource) else 0
            val, _ = world.together(partial(keep, val, "auto", taken=taken))
        loader = Loader(
            source,
            recipe.views,
            order,
            device=device,
            dtype=step.input_dtype,
            decode=options.decode,
            prefetch=options.prefetch,
            rank=world.rank,
            world_size=world.size,
            beside=world.beside,
        )
        stack.callback(loader.close)
        yield Experiment(
            recipe=recipe,
            options=options,
            device=device,
            source=source,
            val=val,
            order=order,
            loader=loader,
            step=step,
            world=world,
            cache=cache,
        )


def _peak(recipe: Recipe, options: RunOptions, device: torch.device, world: World) -> int:
    """Bytes of the GPU that this process's steps take at most; all there are if they do not fit.

    0 where it does not matter: without a GPU, or without a cache that would take what steps need.
    """
    if device.type != "cuda" or options.cache == "off":
        return 0
    captures = wants_capture(options.cuda_graph, device, ranks=world.size)
    peak = peak_step_memory(
        recipe,
        device,
        images=recipe.batch_size // world.size,
        cuda_graph=options.cuda_graph if captures else "off",
    )
    return torch.cuda.get_device_properties(device).total_memory if peak is None else peak


def _keep(
    source: Source,
    choice: Cache,
    *,
    device: torch.device,
    console: Console,
    world: World,
    steps: int = 0,
    taken: int = 0,
) -> tuple[Source, str]:
    """Images as the cache that was chosen gives them, when the networks are on the GPU.

    `steps` bytes of the GPU's memory are for training steps, and `taken` bytes of the machine's are promised already:
    the system counts neither before they are used.

    Raises:
        InputError: they do not fit.
    """
    if choice == "off":
        return source, ""
    memory = free_memory(device, processes=len(world.beside))
    memory = replace(memory, host=max(0, memory.host - taken), steps=steps)
    progress = indexing_progress(console, source.location, what="sizes of")
    return keep_decoded(source, choice, device=device, memory=memory, progress=progress)


def _order(recipe: Recipe, source: Source, val: Source | None, world: World) -> Order:
    """The order of the images, with everything checked that recipe and data must agree on.

    Raises:
        InputError: they do not; the message says where.
    """
    if recipe.evaluation.every_epochs and labelled(source, val):
        check_knn_data(source, val, recipe.evaluation)
    order = Order(
        num_images=len(source),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        chunk=recipe.order_chunk,
        window=recipe.order_window,
    )
    order.positions(0, rank=world.rank, world_size=world.size)
    return order


def _paths(data: Path, val: Path | None, world: World) -> tuple[Path, Path | None]:
    """Where the training images lie and, if there are any, the validation images.

    Raises:
        InputError: there is nothing, or a validation part on some ranks only.
    """
    failure: Exception | None = None
    train = data
    try:
        train, found = split_paths(data)
        val = val or found
    except (InputError, OSError) as error:
        failure = error
    first, *_ = has_val = world.gather_objects(val is not None)  # on every rank, also on one that fails
    if failure is not None:
        raise failure
    if has_val[world.rank] != first:
        raise InputError(
            f"data is {str(data)!r}, which has {'no' if first else 'a'} validation part on rank {world.rank} but "
            f"{'one' if first else 'none'} on rank 0: give every machine the same data set."
        )
    return train, val


def _open(path: Path, console: Console, world: World) -> Source:
    """Open images; rank 0 indexes a folder first, the others find its index in the cache."""
    return world.main_first(lambda: open_source(path, progress=indexing_progress(console, path)))


def _check_same_data(source: Source, world: World) -> None:
    """Check that all ranks see the same images.

    Raises:
        InputError: this rank's differ from rank 0's.
        FailedElsewhere: another rank's do.
    """
    first = world.on_main(lambda: source.fingerprint)

    def compare() -> None:
        if source.fingerprint != first:
            raise InputError(
                f"data is {str(source.location)!r}, which holds other images on rank {world.rank} than on rank 0 "
                "(their names, sizes or labels differ): give every machine the same data set."
            )

    world.together(compare)
