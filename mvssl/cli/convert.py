"""`mvssl-convert`: the command of `pipelines.conversion`, which starts here so that another `pipelines` is noticed."""

from __future__ import annotations

from pipelines.conversion.command import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
