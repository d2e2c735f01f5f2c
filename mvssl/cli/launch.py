"""--devices: starts a process per device through torch's elastic agent, which torchrun is made of too."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from mvssl.config.options import RunOptions
from mvssl.ranks import LAUNCHED, PR_SET_PDEATHSIG, Devices, asked_devices, started_by_torchrun
from pipelines.names import visible
from pipelines.runtime import EXIT_ERROR, EXIT_INTERRUPTED, InputError, invalid

_CODE = f"""
import ctypes, json, os, sys
given = json.loads(os.environ["{LAUNCHED}"])
if sys.platform == "linux":  # end with the starting process, also if it is killed, and before torch is loaded
    ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGTERM)})
if os.getppid() != given["parent"]:
    sys.exit("error: the process that --devices belongs to has ended.")
sys.path[:], sys.argv = given["path"], given["argv"]
from mvssl.cli.train import main
main()
"""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_SECONDS = 60  # for the other processes to end, if one has failed


def wants_launch(options: RunOptions) -> bool:
    """Whether this process starts others instead of training itself.

    Raises:
        InputError: torchrun has started this one.
    """
    if options.devices is None or LAUNCHED in os.environ:
        return False
    if started_by_torchrun():
        raise InputError(
            f"devices is {options.devices!r} but torchrun has started this process, and both start processes: "
            "leave --devices out, or start mvssl-train without torchrun.",
            field="devices",
        )
    return asked_devices(options.devices) != Devices(count=1)


def launch(options: RunOptions, arguments: Sequence[str]) -> int:
    """Run mvssl-train with these arguments in a process per device; the exit code of a single process.

    Signals are passed on to all processes, which save and stop together. What fails is reported by the process that it
    happened to, or here in one sentence if that one was killed.

    Raises:
        InputError: there are not so many devices.
    """
    devices, settings = _resolve(options)
    settings.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // devices)))
    with tempfile.TemporaryDirectory(prefix="mvssl-") as folder:
        settings[LAUNCHED] = json.dumps(
            {"folder": folder, "parent": os.getpid(), "path": sys.path, "argv": [sys.argv[0], *arguments]}
        )
        os.environ.update(settings)
        try:
            return _Processes(devices, Path(folder)).run()
        finally:
            del os.environ[LAUNCHED]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resolve(options: RunOptions) -> tuple[int, dict[str, str]]:
    """Number of processes, and the environment variables that choose their devices."""
    import torch

    asked = asked_devices(options.devices or "1")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device == "cpu":
        if asked.count is None or asked.indices is not None:
            remedy = "give the number of processes"
            raise invalid(
                "devices", options.devices, "a number with --device cpu, which has none to choose from", remedy
            )
        if asked.count > _cores():
            raise invalid("devices", options.devices, f"at most {_cores()}, the cores here", "start fewer processes")
        return asked.count, {}
    if options.device not in ("auto", "cuda"):
        raise InputError(
            f"devices is {options.devices!r} and device is {options.device!r}, which both choose devices: leave one of "
            "--device and --devices out.",
            field="devices",
        )
    if not gpus:
        raise InputError(
            f"devices is {options.devices!r} but PyTorch sees no GPU here: leave --devices out, or add --device cpu to "
            "start processes on the cores.",
            field="devices",
        )
    chosen = asked.indices or tuple(range(gpus if asked.count is None else asked.count))
    if max(chosen) >= gpus:
        here = f"the {gpus} GPU{'s' if gpus > 1 else ''} here"
        allowed = f"at most {here}" if asked.indices is None else f"numbers of {here}, from 0"
        visible_here = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible_here is None else f" (CUDA_VISIBLE_DEVICES is {visible_here!r})"
        raise invalid("devices", options.devices, allowed + hidden, "name fewer")
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
    return len(chosen), {"CUDA_VISIBLE_DEVICES": ",".join(names[number].strip() for number in chosen)}


class _NotStarted(Exception):
    """A signal came before all processes were started."""


def _importance(failure: tuple[int, Any]) -> tuple[bool, bool, int]:
    """A key that puts first what explains the others: errors that were reported, then kills, the earliest ones."""
    code = failure[1].exitcode
    return code < 0, code == -signal.SIGTERM, failure[1].timestamp


class _Processes:
    """The processes of a run on this machine."""

    def __init__(self, count: int, folder: Path) -> None:
        """`folder` is where each process says that it has begun, and its exit code."""
        self._count = count
        self._folder = folder
        self._agent: Any = None
        self._received: signal.Signals | None = None

    def run(self) -> int:
        """Start them and wait for them; the exit code."""
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its words for torchrun's users
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # the agent would end processes that still save
        self._agent = _agent(self._count)
        failures: dict[int, Any] = {}
        with _handled(self._pass_on):
            try:
                failures = self._agent.run().failures
            except _NotStarted:
                return self._nothing_done(self._received or signal.SIGINT)
        if not failures:
            return max(self._code(rank) for rank in range(self._count))
        rank, first = min(failures.items(), key=_importance)
        if first.exitcode > 0:
            return int(first.exitcode)
        if self._received is not None and first.exitcode == -signal.SIGTERM:
            return self._nothing_done(self._received)
        what = f"rank {rank} was killed by {signal.Signals(-first.exitcode).name}"
        why = ", as the system does when its memory is full" if -first.exitcode == signal.SIGKILL else ""
        print(visible(f"error: {what}{why}, and the others were ended: continue with --resume."), file=sys.stderr)
        return EXIT_ERROR

    def _nothing_done(self, received: signal.Signals) -> int:
        """Say that a signal came too early for anything to be saved; the exit code."""
        print(visible(f"error: {received.name} came before the training began; nothing was saved."), file=sys.stderr)
        return EXIT_INTERRUPTED if received == signal.SIGINT else 128 + received

    def _code(self, rank: int) -> int:
        """The exit code that a process has left."""
        try:
            return int((self._folder / f"{rank}.code").read_text())
        except (OSError, ValueError):
            return 0

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Send a signal to all processes; SIGTERM as long as one of them cannot handle it yet."""
        self._received = signal.Signals(number)
        begun = all((self._folder / f"{rank}.begun").exists() for rank in range(self._count))
        workers = [worker.id for worker in self._agent.get_worker_group().workers]
        if not all(isinstance(worker, int) for worker in workers):
            raise _NotStarted
        for worker in workers:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(worker, number if begun else signal.SIGTERM)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals that are passed on, except those that are ignored, as nohup does."""
    before = {}
    for number in _FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _agent(count: int) -> Any:
    """torch's elastic agent for this many processes of this machine, without restarts."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    local = "127.0.0.1"
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr=local,
    )
    spec = WorkerSpec(
        role="mvssl",
        local_world_size=count,
        rdzv_handler=get_rendezvous_handler(parameters),
        entrypoint=sys.executable,
        args=("-c", _CODE),
        max_restarts=0,
        monitor_interval=0.1,
        local_addr=local,
    )
    options: dict[str, Any] = {"shutdown_timeout": _SECONDS}
    try:
        return LocalElasticAgent(spec, logs_specs=DefaultLogsSpecs(), **options)
    except TypeError:  # of an older torch
        return LocalElasticAgent(spec, logs_specs=DefaultLogsSpecs())
