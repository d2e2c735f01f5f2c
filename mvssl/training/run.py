"""A run from its recipe and options to its result: begun or resumed, announced, trained."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from mvssl.config.options import RunOptions, parse_time, resolve_device
from mvssl.config.recipe import Recipe
from mvssl.distributed import join_world, process_local_rank
from mvssl.monitor.console import run_log
from mvssl.monitor.pictures import write_view_sheet
from mvssl.optim.schedule import learning_rate
from mvssl.runs.folder import RunFolder
from mvssl.training.experiment import Experiment, open_experiment
from mvssl.training.loop import Loop, TrainResult
from mvssl.training.memory import explain_out_of_memory
from mvssl.training.metric_buffer import Window
from mvssl.training.monitor import Monitor
from mvssl.training.shutdown import StopRequest
from mvssl.training.state import Position, restore_state
from mvssl.weights.init_from import init_from
from pipelines.runtime import InputError

logger = logging.getLogger("mvssl")


def train(recipe: Recipe, *, data: str | Path, out: str | Path, **options: Any) -> TrainResult:
    """Pre-train a backbone: `RunOptions` says what else can be given.

    In a script that torchrun starts, every process calls this; together they are one run.

    Raises:
        InputError: something given cannot be used.
        Interrupted: SIGINT or SIGTERM came; everything is saved.
        Diverged: the loss became NaN or infinite.
        FailedElsewhere: another rank failed, and says why, or is gone.
    """
    return run(recipe, RunOptions(data=Path(data), out=Path(out), **options))


def run(recipe: Recipe, options: RunOptions, *, console: Console | None = None) -> TrainResult:
    """Train as `recipe` and `options` say; see `train`."""
    if options.out is None:
        raise InputError("out is missing: name the run folder with --out PATH.")
    began, folder = time.monotonic(), RunFolder(options.out)
    device = resolve_device(options.device, local_rank=process_local_rank())
    with join_world(cuda=device.type == "cuda") as world:
        console = (console or Console()) if world.is_main else Console(quiet=True)
        world.on_main(lambda: _check_folder(folder, recipe, options))
        with ExitStack() as claim, open_experiment(recipe, options, console, world) as experiment:
            window = Window()
            claimed = world.on_main(lambda: _claim(folder, claim))  # before anything of an earlier run is touched
            position, earlier = _begin(experiment, folder, window)
            if not claimed:
                world.on_main(lambda: _claim(folder, claim))
            seconds = None if options.time is None else parse_time(options.time) - (time.monotonic() - began)
            with run_log(folder.log, console, rank=world.rank), StopRequest(world, seconds=seconds) as stop:
                _announce(experiment, folder, position.step)
                if earlier is not None:
                    logger.info("%s", _extended(experiment, position.step, earlier))
                if position.step == 0:
                    first = experiment.order.permutation(0)[:4]
                    world.on_main(lambda: write_view_sheet(recipe, experiment.source, first, folder.views))
                with explain_out_of_memory(), Monitor(experiment, folder, console, position) as monitor:
                    return Loop(experiment, folder, window, position, monitor, stop).run()


def _check_folder(folder: RunFolder, recipe: Recipe, options: RunOptions) -> None:
    """Check that the run may go on or begin in this folder, before any work is done for it."""
    if options.resume:
        folder.check_same_recipe(recipe, extend=options.extend)
    else:
        folder.check_free(overwrite=options.overwrite)


def _claim(folder: RunFolder, claim: ExitStack) -> bool:
    """Keep other processes out of the run folder, if it is there already."""
    if not folder.path.is_dir():
        return False
    claim.enter_context(folder.claimed())
    return True


def _begin(experiment: Experiment, folder: RunFolder, window: Window) -> tuple[Position, int | None]:
    """Restore the run in the folder, or make the folder for a new one.

    Returns where the run stands, and for how many epochs it was begun if it is extended now.
    """
    recipe, options, world = experiment.recipe, experiment.options, experiment.world
    earlier = world.on_main(lambda: folder.extend(recipe)) if options.resume else None
    if options.resume and world.on_main(folder.has_checkpoint):
        return restore_state(experiment, folder, window), earlier
    # A run that was stopped before its first checkpoint is resumed at its beginning.
    weights = world.on_main(lambda: folder.option("init_from")) if options.resume else options.init_from
    init_from(experiment.step.online, experiment.step.target, recipe, weights)
    if not options.resume:
        world.on_main(lambda: folder.begin(recipe, _plain(options), overwrite=options.overwrite))
    return Position(), earlier


def _extended(experiment: Experiment, step: int, earlier: int) -> str:
    """What a run that goes on for more epochs does with its learning rate, in a sentence."""
    config, per_epoch = experiment.recipe.optimizer, experiment.order.steps_per_epoch
    peak, warmup = config.base_lr * experiment.recipe.batch_size / 256, config.warmup_epochs * per_epoch
    was, now = (
        learning_rate(step, epochs * per_epoch, warmup, peak, config.final_lr_factor)
        for epochs in (earlier, experiment.recipe.epochs)
    )
    return (
        f"extended from {earlier} to {experiment.recipe.epochs} epochs: the learning rate goes on at {now:.3g}, where "
        f"it had come down to {was:.3g}, and falls along the longer cosine from there"
    )


def _plain(options: RunOptions) -> dict[str, Any]:
    """Options as JSON values; paths are made absolute, so that they hold from any folder."""
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in asdict(options).items()}


def _announce(experiment: Experiment, folder: RunFolder, step: int) -> None:
    """Say in a few lines what is about to run."""
    recipe, order, ranks = experiment.recipe, experiment.order, experiment.world.size
    shared = f" ({recipe.batch_size // ranks} on each of {ranks} processes)" if ranks > 1 else ""
    logger.info(
        "%s %s: %s, %s images, %d views an image, batch %d%s, %d epochs of %d steps, on %s with %s",
        "Resuming" if step else "Training",
        recipe.name,
        recipe.backbone.name,
        f"{len(experiment.source):,}",
        len(recipe.views),
        recipe.batch_size,
        shared,
        recipe.epochs,
        order.steps_per_epoch,
        experiment.device,
        experiment.loader.decoder_name,
    )
    if step:
        logger.info("from step %d of %d", step, experiment.total_steps)
    if experiment.cache:
        logger.info("%s", experiment.cache)
    if recipe.accumulate > 1:
        images = recipe.batch_size // ranks // recipe.accumulate
        logger.info(
            "a step takes its images in %d parts of %d, with one update for all: the numbers of %d processes, each "
            "with a part (BatchNorm over %d images at a time)",
            recipe.accumulate,
            images,
            ranks * recipe.accumulate,
            images,
        )
    if recipe.step_mode == "joint" and experiment.step.view_by_view is not None:
        logger.info(
            "views pass one by one, which is slower than those of one size together: %s takes statistics of its batch "
            "in a way of its own",
            experiment.step.view_by_view,
        )
    if recipe.evaluation.every_epochs and not experiment.evaluates:
        logger.info("no kNN: the images have no labels; collapse is still watched by embedding spread and rank")
    logger.info("run folder: %s", folder.path)
