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

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        mark = f"[yellow]{record.levelname.lower()}:[/] " if record.levelno >= logging.WARNING else ""
        self._console.print(mark + escape(record.getMessage()), soft_wrap=True, highlight=False)


@contextmanager
def run_log(path: Path, console: Console) -> Iterator[None]:
    """Send the records of logger ``mvssl`` to the console (from INFO) and to the file (from DEBUG), while it lasts."""
    logger = logging.getLogger("mvssl")
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [file, _ConsoleHandler(console)]
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
