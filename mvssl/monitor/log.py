"""Where log records of a run go: the console for people, train.log for later."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape


class _ConsoleHandler(logging.Handler):
    """Prints a record's message; warnings are marked."""

    def __init__(self, console: Console, *, level: int = logging.INFO, prefix: str = "") -> None:
        super().__init__(level)
        self._console = console
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        mark = f"[yellow]{record.levelname.lower()}:[/] " if record.levelno >= logging.WARNING else ""
        self._console.print(mark + escape(self._prefix + record.getMessage()), soft_wrap=True, highlight=False)


@contextmanager
def run_log(path: Path, console: Console, *, rank: int = 0) -> Iterator[None]:
    """Send the records of logger ``mvssl`` to the console (from INFO) and to the file (from DEBUG), while it lasts.

    A rank other than 0 writes no file; its warnings go to stderr, with its number.
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
