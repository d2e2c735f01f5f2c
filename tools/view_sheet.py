"""`python -m tools.view_sheet` in a clone: `python -m pipelines.view_sheet`."""

from __future__ import annotations

from pipelines.view_sheet import Options, main, run

__all__ = ["Options", "main", "run"]

if __name__ == "__main__":
    main()
