"""What libgomp itself says about how its threads wait, in each command that computes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

COMPUTING = (
    "train laptop --dry-run --data /nowhere",
    "eval knn --run /nowhere",
    "features /nowhere out.npy --run /nowhere",
    "export --run /nowhere --out out.safetensors",
)
"""Commands that end soon with an error, after torch is loaded."""


def spins(line: str, **own: str) -> set[str]:
    """GOMP_SPINCOUNT of each libgomp that a command loads, with a user's own settings."""
    if sys.platform != "linux":
        pytest.skip("libgomp is Linux's")
    name, *arguments = line.split()
    others = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", f"mvssl.cli.{name}", *arguments],
        env={**others, "OMP_DISPLAY_ENV": "VERBOSE", **own},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return set(re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr))


@pytest.mark.parametrize("line", COMPUTING)
def test_threads_of_every_computing_command_soon_sleep(line: str) -> None:
    assert spins(line) == {"1000"}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
        ({"OMP_NUM_THREADS": "1"}, "1000"),
    ],
)
def test_own_setting_wins(own: dict[str, str], expected: str) -> None:
    assert spins(COMPUTING[1], **own) == {expected}
