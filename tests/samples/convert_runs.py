"""Run mvssl-convert in this process and look at what came out."""

from __future__ import annotations

import hashlib
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
