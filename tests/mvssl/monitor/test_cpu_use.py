"""Who uses the cores: from copies of /proc and of control groups, and beside a real busy process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mvssl.cli import doctor
from mvssl.monitor.bottleneck import describe_bottleneck
from mvssl.monitor.cpu_use import CpuMeter, CpuUse, busy_seconds, find_quota
from pipelines.loader import StageSeconds

TICK = os.sysconf("SC_CLK_TCK")


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_only_the_own_cores_count_and_idle_and_disk_do_not() -> None:
    lines = ["cpu  9 9 9 9 9 9 9 9 9 9", "cpu0 100 20 30 5000 400 5 6 7 50 0", "cpu1 1000 0 0 0 0 0 0 0 0 0", "intr 5"]
    text = "\n".join(lines)
    assert busy_seconds(text, [0]) * TICK == pytest.approx(100 + 20 + 30 + 5 + 6 + 7)
    assert busy_seconds(text, [0, 1]) * TICK == pytest.approx(168 + 1000)
    for cores in ([], [2]):
        with pytest.raises(ValueError, match="not listed"):
            busy_seconds(text, cores)


@pytest.mark.parametrize(("processes", "others"), [(1, 1.1), (2, 0.2)])
def test_others_are_what_the_run_did_not_use(
    processes: int, others: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    now = [0.0]

    def at(second: float) -> None:
        now[0] = second
        put(tmp_path, "proc/stat", "".join(f"cpu{n} {int(TICK * second)} 0 0 0 0 0 0 0 0 0\n" for n in (0, 1)))

    at(100.0)
    meter = CpuMeter(processes=processes, root=tmp_path, clock=lambda: now[0], cpu_seconds=lambda: 0.9 * now[0])
    assert meter.total() is None
    at(110.0)
    use = meter.recent()
    assert use is not None
    assert use.cores == 2
    assert [use.own, use.others] == pytest.approx([0.9 * processes, others])
    assert use.neighbours == (processes == 1)
    at(130.0)
    total = meter.total()
    assert total is not None
    assert total.others == pytest.approx(others)


def test_without_proc_nothing_is_known(tmp_path: Path) -> None:
    meter = CpuMeter(root=tmp_path)
    assert (meter.recent(), meter.total(), meter.quota) == (None, None, None)


def test_the_smallest_quota_of_the_group_and_those_above_it(tmp_path: Path) -> None:
    """Version 2; then a container, which sees its own group at the top."""
    put(tmp_path, "proc/self/cgroup", "0::/slurm/job7/task\n")
    put(tmp_path, "sys/fs/cgroup/slurm/job7/task/cpu.max", "max 100000\n")
    assert find_quota(tmp_path) == (None, None)
    put(tmp_path, "sys/fs/cgroup/slurm/cpu.max", "800000 100000\n")
    put(tmp_path, "sys/fs/cgroup/slurm/job7/cpu.max", "250000 100000\n")
    assert find_quota(tmp_path) == (tmp_path / "sys/fs/cgroup/slurm/job7", 2.5)
    put(tmp_path, "proc/self/cgroup", "0::/not/visible/here\n")
    put(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000\n")
    assert find_quota(tmp_path) == (tmp_path / "sys/fs/cgroup", 1.5)


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_a_quota_of_version_1(controllers: str, tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", f"4:memory:/docker/abc\n3:{controllers}:/docker/abc\n0::/\n")
    top = f"sys/fs/cgroup/{controllers}"
    put(tmp_path, f"{top}/cpu.cfs_quota_us", "-1\n")
    put(tmp_path, f"{top}/cpu.cfs_period_us", "100000\n")
    assert find_quota(tmp_path) == (None, None)
    put(tmp_path, f"{top}/cpu.cfs_quota_us", "50000\n")
    assert find_quota(tmp_path) == (tmp_path / top, 0.5)


@pytest.mark.parametrize("text", ["", "nonsense", "100000", "100000 0", "-5 100000"])
def test_a_quota_that_cannot_be_read_is_none(text: str, tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/\nnonsense\n")
    put(tmp_path, "sys/fs/cgroup/cpu.max", text)
    assert find_quota(tmp_path) == (None, None)


def test_throttling_is_the_fraction_of_periods_since_the_last_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    put(tmp_path, "proc/self/cgroup", "0::/\n")
    put(tmp_path, "proc/stat", "cpu0 0 0 0 0 0 0 0 0 0 0\n")
    put(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000\n")
    put(tmp_path, "sys/fs/cgroup/cpu.stat", "usage_usec 5\nnr_periods 1000\nnr_throttled 900\n")
    now = iter(range(100))
    meter = CpuMeter(root=tmp_path, clock=lambda: float(next(now)), cpu_seconds=lambda: 0.0)
    put(tmp_path, "sys/fs/cgroup/cpu.stat", "usage_usec 5\nnr_periods 1100\nnr_throttled 925\n")
    use = meter.recent()
    assert use is not None
    assert use.throttled == pytest.approx(0.25)
    assert use.limited
    assert use.describe() == "CPU quota of 0.5 cores used up 25 % of the time"


def bottleneck(use: CpuUse, *, device: str = "cpu", wait: float = 0.004) -> str:
    stages = StageSeconds(storage=1, decode=5, views=2)
    return describe_bottleneck(wait, stages, 800, device=torch.device(device), images_per_second=150, cpu=use)


def test_the_bottleneck_is_other_processes_or_the_quota() -> None:
    busy = CpuUse(cores=2, own=0.9, others=1.0)
    assert bottleneck(busy).startswith(
        "the bottleneck is other processes on the same cores: they used 1.0 of 2 cores and this run 0.9: stop them, or "
    )
    assert bottleneck(busy, device="cuda").startswith("the bottleneck is the step")  # the GPU does not wait for them
    waiting = bottleneck(busy, wait=0.3)
    assert waiting.startswith("the bottleneck is decoding: use more --threads")
    assert waiting.endswith("; other processes used 1.0 of 2 cores and this run 0.9)")
    quota = CpuUse(cores=16, own=2.0, others=0.0, quota=2.0, throttled=0.6)
    assert bottleneck(quota).startswith(
        "the bottleneck is the container's CPU quota: 2 cores, used up in 60 % of its periods, while 16 cores are "
        "visible: raise the quota, or set OMP_NUM_THREADS and --threads to 2"
    )


@pytest.mark.parametrize(
    "use",
    [
        CpuUse(cores=2, own=1.9, others=0.1),  # alone
        CpuUse(cores=2, own=1.5, others=0.4),  # a desktop
        CpuUse(cores=16, own=3.0, others=4.0),  # cores enough for both
        CpuUse(cores=64, own=62.0, others=1.0),  # 1 of 64
        CpuUse(cores=16, own=8.0, others=0.0, quota=8.0, throttled=0.02),
    ],
)
def test_no_false_alarms(use: CpuUse) -> None:
    assert bottleneck(use).startswith("the bottleneck is the step")
    assert use.describe() == ""


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat here")
def test_a_busy_process_is_seen() -> None:
    """More cores are used by others with it than without, whatever else runs: it cannot be this process."""
    code = "import time; end = time.time() + 60\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as neighbour:
        try:
            meter, use = CpuMeter(), None
            for _ in range(50):  # until the kernel has given it half a core for a moment
                time.sleep(0.3)
                use = meter.recent()
                if use is not None and use.crowded:
                    break
        finally:
            neighbour.kill()
    assert use is not None
    assert use.crowded


def test_the_doctor_names_neighbours_and_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_WATCHED", 0.0)
    monkeypatch.setattr(CpuMeter, "recent", lambda self: CpuUse(cores=2, own=0.0, others=1.0))
    found = doctor.examine()["cores"]
    assert found.state == "slower"
    assert found.found.endswith("others use 1.0 of 2 cores now")
    monkeypatch.setattr("mvssl.monitor.cpu_use.find_quota", lambda root: (None, 0.5))
    found = doctor.examine()["cores"]
    assert "CPU quota is 0.5 cores" in found.found
    assert found.remedy == "raise the quota, or set OMP_NUM_THREADS and --threads to 1"
