"""Run mvssl-convert in this process and look at what came out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

COUNT = 40  # images in the folder of the fixture `folder`


class Outcome(NamedTuple):
    """Exit code, stdout and stderr of one run."""

    code: str | int | None
    out: str
    err: str


Run = Callable[..., Outcome]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_refused(run: Run, src: Path, dst: Path, message: str) -> None:
    """mvssl-convert ends with one line that the pattern describes, and leaves nothing at `dst`."""
    outcome = run(src, dst)
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert re.search(message, outcome.err), outcome.err
    assert not dst.exists()
