"""Views and their sampling in C."""

from __future__ import annotations

from pathlib import Path

from pipelines.c_library import load_library

SAMPLING = Path(__file__).with_name("sampling.c")


def native_obstacle() -> str | None:
    """Why sampling in C is unavailable, or None. The first call compiles it."""
    library = load_library(SAMPLING)
    return library if isinstance(library, str) else None
