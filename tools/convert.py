"""`python -m tools.convert` in a clone: `mvssl-convert`, whose code is in `pipelines.conversion.command`."""

from __future__ import annotations

from pipelines.conversion.command import Convert, convert, main

__all__ = ["Convert", "convert", "main"]

if __name__ == "__main__":
    main()
