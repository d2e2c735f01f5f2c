"""Who uses the CPU cores of a run: its own processes, others, or nobody because a quota forbids it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_LEAST_OTHERS = 0.5  # cores that others use on average, from which on they are worth a remark
_OTHERS_SHARE = 0.05  # the same as a fraction of all cores, on large machines
_FULL = 0.7  # fraction of the cores in use from which on processes are in each other's way
_THROTTLED = 0.1  # fraction of the periods in which the quota was used up before their end


@dataclass(frozen=True, kw_only=True)
class CpuUse:
    """Use of the cores in some time, in cores (1.0 is one core all the time).

    Attributes:
        cores: that this process may run on.
        own: used by this run, all of its processes on this machine.
        others: used by other processes, on the cores that this process may run on.
        quota: cores that the control group (a container, a SLURM job) may use; None without a quota.
        throttled: fraction of the quota's periods in which the group had to stop; 0 without a quota.
    """

    cores: int
    own: float
    others: float
    quota: float | None = None
    throttled: float = 0.0

    @property
    def crowded(self) -> bool:
        """Whether other processes use cores, needed here or not."""
        return self.others >= max(_LEAST_OTHERS, _OTHERS_SHARE * self.cores)

    @property
    def neighbours(self) -> bool:
        """Whether other processes take cores that this run needs."""
        return self.crowded and self.own + self.others >= _FULL * self.cores

    @property
    def limited(self) -> bool:
        """Whether the quota stops this run."""
        return self.quota is not None and self.throttled >= _THROTTLED

    def describe(self) -> str:
        """What is in the way, in a few words; "" if nothing is."""
        if self.limited:
            return f"CPU quota of {self.quota:.3g} cores used up {100 * self.throttled:.0f} % of the time"
        return self.describe_others() if self.neighbours else ""

    def describe_others(self) -> str:
        """The cores that others use, in a few words."""
        return f"others use {self.others:.1f} of {self.cores} cores"


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """Counters of the system, all of them rising: seconds, and periods of the quota."""

    time: float
    own: float
    busy: float
    periods: int = 0
    throttled: int = 0


class CpuMeter:
    """Measures `CpuUse` between two moments, from /proc and the control group; nothing where there is no /proc/stat."""

    def __init__(
        self,
        *,
        processes: int = 1,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
        cpu_seconds: Callable[[], float] = time.process_time,
    ) -> None:
        """`processes` of the run on this machine are taken to use as much as this one."""
        self._processes = processes
        self._proc = root / "proc"
        self._clock, self._cpu_seconds = clock, cpu_seconds
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._group, self.quota = find_quota(root)
        self._start: _Counts | None = None
        self._last = self._counts()

    def recent(self) -> CpuUse | None:
        """Use since the last call of this method; None if it is not known."""
        last, self._last = self._last, self._counts()
        self._start = self._start or self._last
        return self._between(last, self._last)

    def total(self) -> CpuUse | None:
        """Use since the first call of `recent`, since processes that compile come before; None if it is not known."""
        return self._between(self._start, self._counts())

    def _between(self, begin: _Counts | None, end: _Counts | None) -> CpuUse | None:
        if begin is None or end is None or end.time <= begin.time:
            return None
        seconds, periods = end.time - begin.time, end.periods - begin.periods
        own = self._processes * (end.own - begin.own) / seconds
        return CpuUse(
            cores=len(self._cores),
            own=own,
            others=max(0.0, (end.busy - begin.busy) / seconds - own),
            quota=self.quota,
            throttled=(end.throttled - begin.throttled) / periods if periods > 0 else 0.0,
        )

    def _counts(self) -> _Counts | None:
        now = self._clock(), self._cpu_seconds()
        try:
            busy = busy_seconds((self._proc / "stat").read_text(), self._cores)
        except (OSError, ValueError):
            return None
        periods, throttled = (0, 0) if self._group is None else _throttling(self._group / "cpu.stat")
        return _Counts(time=now[0], own=now[1], busy=busy, periods=periods, throttled=throttled)


def busy_seconds(stat: str, cores: list[int]) -> float:
    """Seconds since the machine's start in which these cores were not idle, from the text of /proc/stat.

    Raises:
        ValueError: it does not have these cores, or it is something else.
    """
    lines = {line.partition(" ")[0]: line.split()[1:] for line in stat.splitlines() if line.startswith("cpu")}
    if not cores or any(f"cpu{core}" not in lines for core in cores):
        raise ValueError("the cores are not listed")
    ticks = 0
    for core in cores:
        user, nice, system, _, _, *more = (int(number) for number in lines[f"cpu{core}"])
        ticks += user + nice + system + sum(more[:3])  # interrupts, and what the hypervisor gave to others
    return ticks / os.sysconf("SC_CLK_TCK")


def find_quota(root: Path = Path("/")) -> tuple[Path | None, float | None]:
    """The folder of the control group with the smallest quota of CPU time, and its cores; (None, None) without one.

    Of both versions of control groups, of this process's group and of those above it. In a container the group's own
    path may not exist; then the top of what is mounted is the container's.
    """
    found: list[tuple[float, Path]] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None, None
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = PurePosixPath("/", path)
        for name in (group, *group.parents):
            folder = top / str(name).lstrip("/")
            if (quota := _quota(folder)) is not None:
                found.append((quota, folder))
    if not found:
        return None, None
    cores, folder = min(found)
    return folder, cores


def _quota(folder: Path) -> float | None:
    """Cores that a control group may use; None if there is no limit."""
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(limit) / int(period) if limit.isdigit() and int(period) > 0 and int(limit) > 0 else None
    except (OSError, ValueError):
        return None


def _throttling(path: Path) -> tuple[int, int]:
    """Periods so far, and those in which the group was stopped."""
    try:
        values = dict(line.split() for line in path.read_text().splitlines())
        return int(values["nr_periods"]), int(values["nr_throttled"])
    except (OSError, ValueError, KeyError):
        return 0, 0
