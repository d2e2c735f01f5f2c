"""Several ranks on this machine, for the tests of distributed training: processes that torchrun could have started."""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp

# Ranks are forked from a server that has imported these and done nothing else: importing takes five seconds of a core.
PRELOADED = (
    *("mvssl.training.preflight", "mvssl.cli.evaluations"),
    *("mvssl.evaluate.knn", "mvssl.evaluate.linear", "mvssl.evaluate.finetune"),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank's work returned, or the name and text of what it raised."""

    result: Any = None
    error: str | None = None
    message: str = ""


def run_ranks(work: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 150.0) -> list[Outcome]:
    """Call `work(*arguments)`, a function of a module, on every rank; the outcomes in the order of the ranks."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        given = (sender, dict(os.environ), rank, ranks, port, work, arguments)
        process = context.Process(target=_rank, args=given, daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    outcomes = []
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(timeout), f"rank {rank} of {ranks} gave no answer within {timeout} s"
            outcomes.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return outcomes


def results(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned, where none may have failed."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank}: {outcome.message}"
    return [outcome.result for outcome in outcomes]


def _rank(
    sender: Connection,
    environment: dict[str, str],
    rank: int,
    ranks: int,
    port: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()  # the server's, which may be older
    os.environ.update(environment)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    try:
        outcome = Outcome(result=work(*arguments))
    except Exception as error:
        outcome = Outcome(error=type(error).__name__, message=f"{error}\n{traceback.format_exc()}")
    file = io.BytesIO()
    torch.save(outcome, file)  # tensors by value: a pipe would share memory with a process that ends
    sender.send_bytes(file.getvalue())
