"""The ranks of a run (started by torchrun) and their collectives.

The training step's tensors use the default process group: NCCL on CUDA, gloo on the CPU. Flags and Python objects use a
gloo group between the hosts, so that they neither need a GPU nor wait for one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mvssl.ranks import PR_SET_PDEATHSIG, OtherRankFailed, process_rank, rank_count
from pipelines.order import Ranks
from pipelines.runtime import InputError

T = TypeVar("T")

_HOST_TIMEOUT = timedelta(hours=2)
"""Timeout of the gloo group: rank 0 may spend long indexing a folder or writing a checkpoint."""


@contextmanager
def _detect_lost_ranks() -> Iterator[None]:
    """Raise OtherRankFailed for gloo's RuntimeError about a broken connection."""
    try:
        yield
    except RuntimeError as error:
        raise OtherRankFailed(
            f"another process of the run is gone ({str(error).splitlines()[0]}): see its message or torchrun's."
        ) from error


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ranks of a run. The default is a single process, which never communicates.

    Attributes:
        rank: 0 to size - 1.
        size: number of ranks.
        local_rank: rank on this host.
        local_size: number of ranks on this host.
        hosts: gloo group of all ranks; None in a single process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    hosts: dist.ProcessGroup | None = None

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0

    @property
    def ranks(self) -> Ranks:
        """This process for the loader; torchrun numbers the ranks of a host consecutively."""
        first = self.rank - self.local_rank
        return Ranks(rank=self.rank, size=self.size, on_host=range(first, first + self.local_size))

    def max(self, value: float) -> float:
        """Maximum over the ranks. Waits for the other hosts, not for a device."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64)
        with _detect_lost_ranks():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.hosts)
        return float(largest)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank. Waits for the other hosts, not for a device."""
        return self.max(float(flag)) > 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks of a tensor on the step's device."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def gather_own_first(self, rows: Tensor) -> Tensor:
        """Rows [B, D] of every rank as [size * B, D], in ring order starting with this rank's; without gradient."""
        if self.size == 1:
            return rows
        everyone = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(everyone, rows.contiguous())
        return torch.cat(everyone[self.rank :] + everyone[: self.rank])

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows [n, ...] of every rank concatenated in rank order, on every rank; n may differ between ranks."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        with _detect_lost_ranks():
            dist.all_reduce(counts, group=self.hosts)
        padded = rows.new_zeros(int(counts.max()), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded)
        return torch.cat([rows[:count] for rows, count in zip(everyone, counts.tolist(), strict=True)])

    def broadcast_from_rank0(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on the step's device with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather_objects(self, value: T) -> list[T]:
        """The values of all ranks in rank order, on every rank."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        with _detect_lost_ranks():
            dist.all_gather_object(everyone, value, group=self.hosts)
        return everyone

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 only; its result on every rank.

        Raises:
            OtherRankFailed: on the other ranks, if rank 0 raised.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, True]  # result, success
        error: Exception | None = None
        if self.is_rank0:
            try:
                outcome[0] = work()
            except Exception as caught:
                outcome[1], error = False, caught
        with _detect_lost_ranks():
            dist.broadcast_object_list(outcome, src=0, group=self.hosts)
        if error is not None:
            raise error
        if not outcome[1]:
            raise OtherRankFailed("rank 0 failed and says why.")
        result: T = outcome[0]
        return result

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Call `work` on every rank; this rank's result, once all ranks have succeeded.

        Raises:
            OtherRankFailed: another rank raised, or a lower rank raised the same error as this one.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        if self.any(error is not None):
            errors = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
            if error is not None and errors.index(errors[self.rank]) == self.rank:
                raise error
            raise OtherRankFailed("another process of the run failed and says why.") from error
        return result

    def run_on_rank0_first(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0, then on the others, which find what rank 0 has cached; errors as in `run_on_all`."""
        if self.is_rank0:
            result = self.run_on_all(work)
            self.run_on_all(lambda: None)
            return result
        self.run_on_all(lambda: None)
        return self.run_on_all(work)


@contextmanager
def join_world(*, cuda: bool) -> Iterator[World]:
    """Join the process group of a run that torchrun started and leave it at the end; a no-op in a single process.

    After an exception the group is not destroyed: NCCL would wait for ranks that wait for this one, and the error would
    not be shown until the timeout.

    Args:
        cuda: whether the step runs on CUDA devices (NCCL) or on CPUs (gloo).

    Raises:
        InputError: torchrun's environment variables are incomplete, or the other ranks cannot be reached.
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
    _end_with_torchrun()
    rank, local_rank = process_rank(), int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local_rank)
    created = not dist.is_initialized()
    try:
        if created:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        hosts = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)
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
    if created:
        dist.destroy_process_group()


def _end_with_torchrun() -> None:
    """Get SIGTERM when torchrun dies: killed, it cannot end its ranks, which would train on and hold the run's lock."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
