"""Where things lie that can be made again: indexes of folders, compiled code."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mvssl``, else ``~/.cache/mvssl``, else ``mvssl-<uid>`` among the temporary files.

    It need not exist.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "mvssl"
    try:
        return Path.home() / ".cache" / "mvssl"
    except RuntimeError:  # no HOME, and a user id without a name: usual in containers
        return Path(tempfile.gettempdir()) / f"mvssl-{os.getuid()}"
