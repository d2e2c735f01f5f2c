"""Peak memory of a process and its descendants, sampled from /proc (Linux)."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_KIB_PER_MIB = 1024


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a tree of processes holds in memory, in MiB. Files that are mapped (FFCV's) count as far as they are read.

    Attributes:
        rss: sum of the resident sets; a page that several of the processes share (after a fork) counts in each.
        pss: the same with every shared page divided among those who share it: what the tree really takes.
        processes: how many there are.
    """

    rss: float = 0.0
    pss: float = 0.0
    processes: int = 0


def memory_of(root: int) -> Memory:
    """Memory of process `root` and its descendants now; zeros where /proc does not tell."""
    rss = pss = 0
    pids = _tree(root)
    for pid in pids:
        values = _rollup(pid)
        rss += values.get("Rss", 0)
        pss += values.get("Pss", 0)
    return Memory(rss=rss / _KIB_PER_MIB, pss=pss / _KIB_PER_MIB, processes=len(pids))


class PeakMemory:
    """Samples a tree of processes in a thread while it is entered.

    Attributes:
        peak: the largest of each value so far.
    """

    def __init__(self, root: int, *, every: float = 0.2) -> None:
        """Watch process `root` and its descendants, every so many seconds."""
        self.peak = Memory()
        self._root = root
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak = largest(self.peak, memory_of(self._root))
            if self._stop.wait(self._every):
                return


def largest(one: Memory, other: Memory) -> Memory:
    """The larger of each value."""
    return Memory(
        rss=max(one.rss, other.rss), pss=max(one.pss, other.pss), processes=max(one.processes, other.processes)
    )


def _tree(root: int) -> list[int]:
    """Process `root` and all its descendants."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit():
            try:
                status = Path("/proc", name, "stat").read_text()
            except OSError:  # it has ended
                continue
            parent = int(status.rpartition(")")[2].split()[1])  # the name before may hold spaces and parentheses
            children.setdefault(parent, []).append(int(name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _rollup(pid: int) -> dict[str, int]:
    """The sums of /proc/PID/smaps_rollup in KiB by name; {} for a process that has ended."""
    try:
        lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
