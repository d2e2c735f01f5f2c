"""Builds the parts of a run from a recipe and options (data, order, loader, step), and saves and restores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console

from mvssl.config.device import computed_precision, resolve_device
from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.distributed import World
from mvssl.evaluate.online_knn import check_knn_data, scorable
from mvssl.runs import checkpoint
from mvssl.runs.changes import Computed
from mvssl.runs.data_record import DataRecord
from mvssl.runs.folder import RunFolder
from mvssl.training.arguments import NOTHING_GIVEN, GivenData
from mvssl.training.compile import keep_compiled_code
from mvssl.training.cuda_graph import wants_capture
from mvssl.training.memory import peak_step_memory
from mvssl.training.run_data import (
    check_same_images,
    check_same_range,
    data_paths,
    open_run_images,
    stated_range,
)
from mvssl.training.step import TrainStep
from mvssl.weights.backbone_file import export_backbone
from pipelines.loader import Loader
from pipelines.loading import Cache
from pipelines.loading.pixel_cache import CachedSource, free_memory, with_cache
from pipelines.order import Order
from pipelines.progress import Progress
from pipelines.runtime import InputError
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source
from pipelines.views.spec import tasks


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        metrics_bytes: size of metrics.jsonl at that point; what a killed run wrote beyond it is cut off.
        evaluated: False if the evaluation due after this step is still to be done.
        buffer: `MetricBuffer.state_dict`, the metrics that are not logged yet; None for a new run.
        before: how the steps so far were computed; None for a new run.
    """

    step: int = 0
    metrics_bytes: int = 0
    evaluated: bool = True
    buffer: dict[str, Any] | None = None
    before: Computed | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The parts of a run.

    Attributes:
        recipe: determines the numbers.
        options: where to read and how to report.
        device: where the step runs.
        source: the training images.
        val: the validation images, if any; without those of classes that no training image has.
        evaluates: whether the run computes kNN: the recipe asks for it and the labels allow it.
        order: the order of the images.
        loader: batches of views in that order.
        step: one optimiser update.
        world: the ranks of the run.
        cache: a sentence on where decoded images are cached; "" without a cache.
        notes: what the user should know of the data, for the log.
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
    evaluates: bool
    cache: str = ""
    notes: tuple[str, ...] = ()

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.recipe.epochs * self.order.steps_per_epoch

    @property
    def computed(self) -> Computed:
        """How steps are computed."""
        precision = computed_precision(self.recipe.precision, self.device)
        return Computed(recipe=self.recipe, precision=precision, ranks=self.world.size)

    def save(self, folder: RunFolder, position: Position, *, best: Sequence[int] = ()) -> int | None:
        """Write a checkpoint, then the exported backbone. If that fails, earlier checkpoints are untouched.

        `best` are the steps of evaluations, the best first. Returns the step of the best one that has a checkpoint.
        """
        checkpoint.save(
            folder.checkpoints,
            step=position.step,
            state={"step": self.step.state_dict(), "window": position.buffer},
            meta={
                "recipe": to_dict(self.recipe),
                "options": folder.options(),  # with the recipe a copy of config.json
                "precision": self.computed.precision,
                "ranks": self.world.size,
                "data": self.source.fingerprint,
                "metrics_bytes": position.metrics_bytes,
                "evaluated": position.evaluated,
            },
            keep=self.options.keep_checkpoints,
            best=best,
        )
        self._export(folder)
        return checkpoint.link_best(folder.checkpoints, best)

    def restore(self, folder: RunFolder) -> Position:
        """Load the last checkpoint, read by rank 0 and sent to any number of ranks; the run's position.

        Exports the backbone again: a kill may have come between checkpoint and export.
        """
        saved = self.world.run_on_rank0(lambda: checkpoint.load(folder.newest))
        saved.needs("recipe", "data", "metrics_bytes", "evaluated")
        self.world.run_on_rank0(lambda: self.check_images(folder, saved.meta["data"]))
        try:
            self.step.load_state_dict(saved.state["step"])
            buffer = checked_buffer(saved.state["window"], len(tasks(self.recipe.views)))
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise saved.damaged(f"state.pt: {str(error).splitlines()[0]}") from error
        self.world.run_on_rank0(lambda: self._export(folder))
        return Position(
            step=int(saved.meta["step"]),
            metrics_bytes=int(saved.meta["metrics_bytes"]),
            evaluated=bool(saved.meta["evaluated"]),
            buffer=buffer,
            before=self._computed_before(saved),
        )

    def _computed_before(self, saved: checkpoint.Checkpoint) -> Computed:
        """How the steps of a checkpoint were computed; as now, if a version that did not record it has written it."""
        recipe, meta = saved.recipe(), saved.meta
        return Computed(
            recipe=recipe,
            precision=meta.get("precision", computed_precision(recipe.precision, self.device)),
            ranks=meta.get("ranks", self.world.size),
        )

    def check_images(self, folder: RunFolder, fingerprint: str | None) -> None:
        """Check that the images are those of the run, perhaps in another form, such as converted.

        Args:
            folder: of the run; without a record of its images, one is made.
            fingerprint: of the images at the last checkpoint; None if there is none yet.
        """
        recorded = DataRecord.load(folder.data)
        if fingerprint == self.source.fingerprint or (fingerprint is None and recorded is None):
            if recorded is None:  # a run of an earlier version, or one that was killed before it had written the record
                DataRecord.of(self.source).save(folder.data)
            return
        found = [] if recorded is None else recorded.differences(DataRecord.of(self.source))
        if recorded is not None and not found:
            return
        how = "; ".join(found) or "their names, sizes or labels differ"
        raise InputError(
            f"data is {str(self.options.data or self.source.location)!r} but the run was started with other images "
            f"({how}): give the data set the run was started with, or start a new run with another --out (--init-from "
            "loads its weights).",
            field="data",
        )

    def _export(self, folder: RunFolder) -> None:
        export_backbone(self.step.online.backbone, self.recipe.backbone.name, folder.backbone)


def checked_buffer(buffer: Any, tasks_count: int) -> dict[str, Any] | None:
    """The metrics that a checkpoint keeps until the next log point.

    Raises:
        ValueError: they are not those of a run with this number of tasks.
    """
    if buffer is None:
        return None
    rows, index = buffer["rows"], buffer["index"]
    if not all(isinstance(one, list) and all(isinstance(x, torch.Tensor) for x in one) for one in (rows, index)):
        raise ValueError("its metrics are no lists of tensors")
    if len(rows) != len(index) or any(row.shape != (2 + tasks_count,) or not row.is_floating_point() for row in rows):
        raise ValueError(f"its metrics are not of {tasks_count} tasks")
    if any(numbers.ndim != 1 or numbers.dtype != torch.int64 for numbers in index):
        raise ValueError("its metrics are of no images")
    return {"rows": rows, "index": index}


@contextmanager
def open_experiment(
    recipe: Recipe, options: RunOptions, console: Console, world: World, given: GivenData = NOTHING_GIVEN
) -> Iterator[Experiment]:
    """Build the parts of a run on this rank, and close them at the end."""
    if options.data is None and given.train is None:
        raise InputError("data is missing: give a folder of images, or a converted data set, with --data PATH.")
    device = resolve_device(options.device, local_rank=world.local_rank if world.size > 1 else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, CUDA graphs and allocations must be on the GPU that was asked for
    keep_compiled_code()
    with ExitStack() as stack:
        train: object = given.images
        validation: object = options.val
        if options.data is not None:
            train, validation = world.run_on_all(
                partial(data_paths, options.data, options.val, world, remote=options.remote)
            )
        validation = given.val if given.val is not None else validation
        stated = world.run_on_rank0(partial(stated_range, options))
        source = open_run_images(train, console, world, stated=stated, limits=options.limits, remote=options.remote)
        stack.callback(source.close)
        known = facts_of(source).value_range
        if known is not None:  # also of converted data; kept with the run
            options = replace(options, value_range=str(known))
        val = None
        if validation is not None:
            val = open_run_images(
                validation,
                console,
                world,
                stated=stated,
                default=known,
                limits=options.limits,
                remote=options.remote,
                field="val",
            )
            stack.callback(val.close)
            check_same_range(source, val)
            check_same_images(val, world)
        check_same_images(source, world)
        evaluates, note = False, ""
        if recipe.evaluation.every_epochs:
            evaluates, val, note = scorable(source, val)
        if evaluates:
            world.run_on_all(partial(check_knn_data, source, val, recipe.evaluation))
        order = world.run_on_all(partial(_make_order, recipe, source, world))
        peak = world.run_on_all(partial(_peak_memory, recipe, options, device, world))
        step = TrainStep(
            recipe,
            execution=options,
            device=device,
            total_steps=recipe.epochs * order.steps_per_epoch,
            steps_per_epoch=order.steps_per_epoch,
            world=world,
        )
        steps = max(0, peak - torch.cuda.memory_reserved(device)) if peak else 0  # the networks are reserved already
        cached = partial(_cached, device=device, console=console, world=world, steps=steps)
        source, cache = world.run_on_all(partial(cached, source, options.cache))
        if val is not None and options.cache != "off":  # an explicit place is for the training images only
            taken = source.cache.nbytes if isinstance(source, CachedSource) else 0
            val, _ = world.run_on_all(partial(cached, val, "auto", taken=taken))
        loader = Loader(
            source,
            recipe.views,
            order,
            device=device,
            dtype=step.input_dtype,
            decode=options.decode,
            prefetch=options.prefetch,
            ranks=world.ranks,
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
            evaluates=evaluates,
            cache=cache,
            notes=(*facts_of(source).notes, *filter(None, (note,))),
        )


def _make_order(recipe: Recipe, source: Source, world: World) -> Order:
    """The order of the images; checks recipe, data and ranks against each other."""
    order = Order(
        num_images=len(source),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        chunk=recipe.order_chunk,
        window=recipe.order_window,
    )
    order.positions(0, world.ranks)  # checks that the batch divides among the ranks
    return order


def _peak_memory(recipe: Recipe, options: RunOptions, device: torch.device, world: World) -> int:
    """Peak bytes of GPU memory of this rank's steps, to be left free by the cache; all memory if steps do not fit.

    0 on the CPU and without a cache.
    """
    if device.type != "cuda" or options.cache == "off":
        return 0
    captures = wants_capture(options.cuda_graph, device, ranks=world.size)
    execution = options if captures else replace(options, cuda_graph="off")
    peak = peak_step_memory(recipe, execution, device, images=recipe.batch_size // world.size)
    return torch.cuda.get_device_properties(device).total_memory if peak is None else peak


def _cached(
    source: Source,
    choice: Cache,
    *,
    device: torch.device,
    console: Console,
    world: World,
    steps: int = 0,
    taken: int = 0,
) -> tuple[Source, str]:
    """The source behind the chosen cache of decoded images, and a sentence about it.

    Neither `steps` bytes of GPU memory, reserved for training, nor `taken` bytes of host memory, promised to another
    cache, are visible to the system yet.
    """
    if choice == "off":
        return source, ""
    memory = free_memory(device, processes=world.local_size)
    memory = replace(memory, host=max(0, memory.host - taken), steps=steps)
    progress = Progress(console, f"sizes of {source.location}").update
    return with_cache(source, choice, device=device, memory=memory, progress=progress)
