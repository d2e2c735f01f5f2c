"""Sends a run's log records to the console and to train.log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape


@contextmanager
def run_log(path: Path, console: Console, *, rank: int = 0) -> Iterator[None]:
    """Send records of the logger ``mvssl`` to the console (from INFO) and to the file `path` (from DEBUG).

    Ranks other than 0 write no file; their warnings go to stderr, with the rank.
    """
    logger = logging.getLogger("mvssl")
    handlers: list[logging.Handler]
    if rank == 0:
        file = logging.FileHandler(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers = [file, _ConsoleHandler(console)]
    else:
        handlers = [_ConsoleHandler(Console(stderr=True), level=logging.WARNING, prefix=f"rank {rank}: ")]
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        logger.debug("stopped by %s: %s", type(error).__name__, error)
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.propagate = propagate


class _ConsoleHandler(logging.Handler):
    """Prints messages; warnings and errors with their level."""

    def __init__(self, console: Console, *, level: int = logging.INFO, prefix: str = "") -> None:
        super().__init__(level)
        self._console = console
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        mark = f"[yellow]{record.levelname.lower()}:[/] " if record.levelno >= logging.WARNING else ""
        self._console.print(mark + escape(self._prefix + record.getMessage()), soft_wrap=True, highlight=False)
