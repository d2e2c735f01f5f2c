"""The processes of a run, on torch.distributed: who this one is, and what they do together.

torchrun starts one process per device and says who is who in environment variables. Tensors of the training step travel
on the default group (NCCL on CUDA, gloo on the CPU); votes and Python objects travel between the hosts on a gloo group,
so that they neither wait for a GPU nor need one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.order import Ranks
from pipelines.runtime import InputError

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)
"""How long ranks wait for the others on the hosts' group: rank 0 may index a large folder or write a checkpoint."""


class FailedElsewhere(Exception):
    """Another rank failed at what all do together, and says why itself; or it is gone."""


@contextmanager
def _noticing_loss() -> Iterator[None]:
    """Tell a connection that broke between the hosts from a bug of this rank.

    Raises:
        FailedElsewhere: gloo lost another rank.
    """
    try:
        yield
    except RuntimeError as error:
        raise FailedElsewhere(
            f"another process of the run is gone ({str(error).splitlines()[0]}): see its message or torchrun's."
        ) from error


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of a run. The default is a run of one process, where nothing below communicates.

    Attributes:
        rank: of this process, 0 to size - 1.
        size: processes of the run.
        local_rank: of this process on its machine.
        local_size: processes of the run on this machine.
        hosts: gloo group of all ranks; None in a run of one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    hosts: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and talks to the user."""
        return self.rank == 0

    @property
    def ranks(self) -> Ranks:
        """This process for the loader; torchrun numbers the ranks of a host consecutively."""
        first = self.rank - self.local_rank
        return Ranks(rank=self.rank, size=self.size, on_host=range(first, first + self.local_size))

    def max(self, value: float) -> float:
        """The largest of all ranks' values. Waits for the other hosts, not for a device."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64)
        with _noticing_loss():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.hosts)
        return float(largest)

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank. Waits for the other hosts, not for a device."""
        return self.max(float(flag)) > 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks of a tensor on the step's device."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def gather_own_first(self, rows: Tensor) -> Tensor:
        """Rows [B, D] of every rank as [size * B, D], this rank's first, then those of the ranks behind it, in a ring.

        No gradient flows through.
        """
        if self.size == 1:
            return rows
        everyone = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(everyone, rows.contiguous())
        return torch.cat(everyone[self.rank :] + everyone[: self.rank])

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows [n, ...] of every rank, n may differ, as one tensor in the order of the ranks, on every rank."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        with _noticing_loss():
            dist.all_reduce(counts, group=self.hosts)
        padded = rows.new_zeros(int(counts.max()), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded)
        return torch.cat([part[:count] for part, count in zip(everyone, counts.tolist(), strict=True)])

    def take_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on the step's device by those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        with _noticing_loss():
            dist.all_gather_object(everyone, value, group=self.hosts)
        return everyone

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 alone and give its result to all ranks.

        Raises:
            FailedElsewhere: it failed there (on rank 0: what it raised).
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, True]
        error: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as caught:
                outcome[1], error = False, caught
        with _noticing_loss():
            dist.broadcast_object_list(outcome, src=0, group=self.hosts)
        if error is not None:
            raise error
        if not outcome[1]:
            raise FailedElsewhere("rank 0 failed and says why.")
        result: T = outcome[0]
        return result

    def together(self, work: Callable[[], T]) -> T:
        """Do something on every rank, and let all know whether it worked everywhere.

        Raises:
            FailedElsewhere: it failed on another rank (on that one: what it raised), or here as on a rank before.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        if self.any(error is not None):
            said = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
            if error is not None and said.index(said[self.rank]) == self.rank:
                raise error
            raise FailedElsewhere("another process of the run failed and says why.") from error
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        """Do something on rank 0, then on the others (which find what it left in a cache).

        Raises:
            FailedElsewhere: it failed on another rank (on that one: what it raised).
        """
        if self.is_main:
            result = self.together(work)
            self.together(lambda: None)
            return result
        self.together(lambda: None)
        return self.together(work)


def rank_count() -> int:
    """Processes of the run that this process belongs to, by torchrun's environment variables; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Rank of this process, by torchrun's environment variables; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def process_local_rank() -> int | None:
    """Number of this process on its machine, by torchrun's environment variables; None in a run of one process."""
    number = os.environ.get("LOCAL_RANK")
    return None if rank_count() == 1 or number is None else int(number)


@contextmanager
def join_world(*, cuda: bool) -> Iterator[World]:
    """Join the other processes of a run that torchrun started; leave them at the end. Alone, nothing is set up.

    After an exception the processes are not disconnected: NCCL would wait there for ranks that wait for this one, and
    what went wrong would not be said until the timeout.

    Args:
        cuda: whether the step runs on CUDA devices (NCCL) or on CPUs (gloo).

    Raises:
        InputError: torchrun's environment variables are incomplete, or the others cannot be reached.
    """
    if rank_count() == 1:
        yield World()
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {rank_count()} but {', '.join(missing)} is not set: start several processes with torchrun, "
            "or unset WORLD_SIZE."
        )
    rank, local_rank = process_rank(), int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local_rank)
    ours = not dist.is_initialized()
    try:
        if ours:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        hosts = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"Rank {rank} could not join the other {rank_count() - 1} processes ({str(error).splitlines()[0]}): "
            "check that all were started with the same torchrun address and that its port is free; between machines, "
            "GLOO_SOCKET_IFNAME names the network interface where a host name does not lead to it."
        ) from error
    if not isinstance(hosts, dist.ProcessGroup):
        raise InputError(f"Rank {rank} is no member of the run's process group: start all ranks with one torchrun.")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", rank_count()))
    yield World(rank=rank, size=rank_count(), local_rank=local_rank, local_size=local_size, hosts=hosts)
    if ours:
        dist.destroy_process_group()
