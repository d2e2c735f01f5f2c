"""Callbacks: a user's own code that is told how a run gets on, and may stop it."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvssl.runs.folder import RunFolder
from mvssl.training.experiment import Experiment
from mvssl.training.monitor import Monitor
from mvssl.training.shutdown import CALLBACK, StopRequest
from mvssl.training.step import StepOutput
from pipelines.checks import brief
from pipelines.runtime import InputError
from pipelines.views.spec import tasks

EVENTS = ("on_step_end", "on_epoch_end", "on_save")
logger = logging.getLogger("mvssl")


class StopTraining(Exception):
    """Raised by a callback: save, and end the run here. `resume=True` can continue it."""


class CallbackFailed(InputError):
    """A callback raised an exception, which is the cause of this one. The run is saved and can be resumed."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What callbacks are given.

    Attributes:
        step: optimiser steps done, of the whole run.
        steps: of the whole run.
        epoch: the epoch that this step is in, from 0, as in metrics.jsonl.
        epochs: of the whole run.
        out: the run folder.
        metrics: values of the last log point (every `log_every` steps) and the last evaluation, by the names of
            `TrainResult.curves`: loss, loss/global, lr, knn/top1, ...; empty before the first one.
        logged: whether the log point is this step.
        checkpoint: the folder of the checkpoint, in `on_save`; else None.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    out: Path
    metrics: Mapping[str, float]
    logged: bool
    checkpoint: Path | None = None
    _output: StepOutput | None = field(default=None, repr=False)
    _tasks: tuple[str, ...] = field(default=(), repr=False)

    def losses(self) -> dict[str, float]:
        """The loss of each task in this step, of this rank's images; call it during the callback.

        It waits for the device, so that calling it at every step costs GPU time.
        """
        if self._output is None:
            return {}
        return dict(zip(self._tasks, self._output.losses.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Hook:
    """A function to call at an event, and what messages call it."""

    name: str
    call: Callable[[TrainState], object]


def hooks_of(callbacks: object) -> dict[str, tuple[Hook, ...]]:
    """The functions to call at each event (`EVENTS`), in order.

    Args:
        callbacks: one of, or a list of: an object with one or more of the methods `EVENTS`; a mapping of such names to
            functions; a function, which is called as `on_step_end`. None for none.

    Raises:
        InputError: it is something else.
    """
    hooks: dict[str, list[Hook]] = {event: [] for event in EVENTS}
    several = isinstance(callbacks, (list, tuple))
    given: Sequence[Any] = (
        () if callbacks is None else callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    )
    for n, one in enumerate(() if callbacks is None else given):
        where = f"callbacks[{n}]" if several else "callbacks"
        for event, hook in _hooks(one, where):
            _check_plain(hook, where)
            hooks[event].append(hook)
    return {event: tuple(found) for event, found in hooks.items()}


def _check_plain(hook: Hook, where: str) -> None:
    """Raise InputError for a function whose call does nothing yet: a coroutine's, or a generator's."""
    for call in (hook.call, vars(type(hook.call)).get("__call__")):
        if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call) or inspect.isgeneratorfunction(call):
            kind = "a generator" if inspect.isgeneratorfunction(call) else "async"
            raise InputError(
                f"{where} has {hook.name}, which is {kind} but must be a plain function: write it with def"
                f"{' and without yield' if kind != 'async' else ''}.",
                field=where,
            )


def _hooks(one: Any, where: str) -> list[tuple[str, Hook]]:
    allowed = f"an object with one of {', '.join(EVENTS)}, a mapping of these names to functions, or a function"
    if isinstance(one, type):
        raise InputError(
            f"{where} is the class {one.__name__} but must be an object: write {one.__name__}().", field=where
        )
    if isinstance(one, Mapping):
        for name, call in one.items():
            if name not in EVENTS or not callable(call):
                near = difflib.get_close_matches(str(name), EVENTS, n=1)
                remedy = f"did you mean {near[0]}" if near and name not in EVENTS else "correct it"
                raise InputError(f"{where} has {name!r}: {brief(call)} but must be {allowed}: {remedy}.", field=where)
        return [(name, Hook(name=f"{where}[{name!r}]", call=call)) for name, call in one.items()]
    kind = type(one).__name__
    found = [(event, getattr(one, event)) for event in EVENTS if callable(getattr(one, event, None))]
    if found:
        return [(event, Hook(name=f"{kind}.{event}", call=call)) for event, call in found]
    if callable(one):
        return [("on_step_end", Hook(name=getattr(one, "__name__", kind), call=one))]
    own = next((name for name in dir(one) if name.startswith("on")), "")
    near = difflib.get_close_matches(own, EVENTS, n=1)
    remedy = f"did you mean {near[0]} for {own}" if near else "give one, or leave it out"
    if own in EVENTS:
        remedy = f"make its {own} a function"
    raise InputError(f"{where} is {brief(one)} but must be {allowed}: {remedy}.", field=where)


class Callbacks:
    """Calls a run's callbacks on rank 0, and remembers that one of them asked for the end or failed.

    Attributes:
        stopped_by: name of the callback that ends the run; None as long as none does.
    """

    def __init__(
        self, hooks: Mapping[str, tuple[Hook, ...]], experiment: Experiment, folder: RunFolder, monitor: Monitor
    ) -> None:
        self.stopped_by: str | None = None
        self._hooks = hooks if experiment.world.is_rank0 else {}
        self._experiment = experiment
        self._folder = folder
        self._monitor = monitor
        self._tasks = tasks(experiment.recipe.views)
        self._failure: tuple[Hook, int, BaseException] | None = None

    def step_ended(self, output: StepOutput, *, step: int, logged: bool) -> None:
        """After every step."""
        if self._hooks.get("on_step_end"):
            self._call("on_step_end", self._state(step, logged=logged, _output=output))

    def epoch_ended(self, output: StepOutput, *, step: int) -> None:
        """After the last step of an epoch, and its evaluation."""
        if self._hooks.get("on_epoch_end"):
            with self._monitor.pause():
                self._call("on_epoch_end", self._state(step, logged=True, _output=output))

    def saved(self, *, step: int) -> None:
        """After a checkpoint was written."""
        if self._hooks.get("on_save"):
            with self._monitor.pause():
                self._call("on_save", self._state(step, logged=False, checkpoint=self._folder.newest.resolve()))

    def request(self, stop: StopRequest) -> None:
        """Pass a wish to stop on to the run."""
        if self.stopped_by is not None and stop.requested is None:
            stop.requested = CALLBACK

    def check(self) -> None:
        """Raise `CallbackFailed` if a callback has failed; the run is saved by then."""
        if self._failure is not None:
            hook, step, error = self._failure
            first = next(iter(str(error).strip().splitlines()), "")
            raised = f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__
            raised = raised.rstrip(".")  # a sentence of its own, such as an InputError's
            raise CallbackFailed(
                f"The callback {hook.name} raised {raised} at step {step}: everything is saved in {self._folder.path}; "
                "correct the callback and continue with resume=True.",
                field="callbacks",
            ) from error

    def _state(self, step: int, **more: Any) -> TrainState:
        experiment = self._experiment
        return TrainState(
            step=step,
            steps=experiment.total_steps,
            epoch=(step - 1) // experiment.order.steps_per_epoch,
            epochs=experiment.recipe.epochs,
            out=self._folder.path,
            metrics=self._monitor.latest,
            _tasks=self._tasks,
            **more,
        )

    def _call(self, event: str, state: TrainState) -> None:
        """Call the callbacks of an event, until one asks for the end or fails."""
        for hook in self._hooks[event]:
            if self.stopped_by is not None and event == "on_step_end":
                return
            has_gradients = torch.is_grad_enabled()
            try:
                if _is_true(hook.call(state)):
                    self._stop(hook, state.step, "")
            except StopTraining as reason:
                self._stop(hook, state.step, str(reason))
            except (Exception, SystemExit) as error:
                self.stopped_by = hook.name
                if self._failure is None:
                    self._failure = (hook, state.step, error)
            finally:
                torch.set_grad_enabled(has_gradients)  # one that evaluates may leave it off

    def _stop(self, hook: Hook, step: int, reason: str) -> None:
        if self.stopped_by is None:
            self.stopped_by = hook.name
            logger.info("the callback %s ends the run at step %d%s", hook.name, step, f": {reason}" if reason else "")


def _is_true(answer: object) -> bool:
    """Whether a callback returned True, also NumPy's or a tensor's; no other value ends a run."""
    if isinstance(answer, torch.Tensor):
        return answer.dtype == torch.bool and answer.ndim == 0 and bool(answer)
    return isinstance(answer, (bool, np.bool_)) and bool(answer)
