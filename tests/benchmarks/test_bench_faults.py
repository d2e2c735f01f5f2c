"""Kills and disk errors at a few operations of every command; `python -m benchmarks.bench_faults` tries all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_faults import COMMANDS, FAULTS
from benchmarks.bench_memory import slope


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_nothing_is_lost_or_blocked(tmp_path: Path) -> None:
    """In a process of its own, which has no threads yet and so can fork."""
    out = tmp_path / "faults.json"
    command = [sys.executable, "-m", "benchmarks.bench_faults", "--sample", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[:2000] + done.stderr[-2000:]
    rows = json.loads(out.read_text())["commands"]
    assert [row["command"] for row in rows] == list(COMMANDS)
    for row in rows:
        assert row["operations"] >= 4
        assert row["faults"] == {fault: {"tried": 1, "failed": 0} for fault in FAULTS}


@pytest.mark.slow
def test_a_lost_file_is_noticed(tmp_path: Path) -> None:
    """The benchmark itself: a command that forgets to write its file when it is given again."""
    code = (
        "import benchmarks.bench_faults as b, dataclasses, sys\n"
        "b.COMMANDS['report'] = dataclasses.replace(b.COMMANDS['report'], again=lambda words: ('--list',))\n"
        "sys.exit(b.body(['--commands', 'report', '--faults', 'kill', '--sample', '2']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "other files" in done.stdout


def test_the_slope_is_that_of_the_second_half() -> None:
    samples = [(epoch, 100.0 + (50 if epoch > 10 else epoch)) for epoch in range(1, 41)]
    assert slope(samples)["mib_per_100_epochs"] == pytest.approx(0, abs=1e-9)
    assert slope([(epoch, 2.0 * epoch) for epoch in range(1, 41)])["mib_per_100_epochs"] == pytest.approx(200)
