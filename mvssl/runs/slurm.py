"""What a run does in a job of SLURM: it puts itself into the queue again when it is stopped for the job's end."""

from __future__ import annotations

import os
import shutil
import subprocess


def requeue(stopped_by: str) -> str | None:
    """Put this job into the queue again if SIGUSR1 stopped the run; says what was done, None if nothing was."""
    job = os.environ.get("SLURM_JOB_ID")
    if stopped_by != "SIGUSR1" or job is None or shutil.which("scontrol") is None:
        return None
    done = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
    if done.returncode:
        return f"SLURM did not take job {job} into the queue again ({done.stderr.strip()}): submit it anew."
    return f"SLURM takes job {job} into the queue again."
