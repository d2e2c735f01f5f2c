"""Sends a run's log records to the console and to train.log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pipelines.names import VisibleFormatter, cell, say
from pipelines.runtime import SteadyStream, describe_os_error, steady


@contextmanager
def run_log(console: Console, *, rank: int = 0) -> Iterator[Callable[[Path], None]]:
    """Send records of the logger ``mvssl`` to the console (from INFO) and to a file (from DEBUG).

    Yields a function that opens the file, which the records so far are then written to as well. Ranks other than 0
    write no file; their warnings go to stderr, with the rank. If the console goes away, the file still has everything,
    and warnings go to stderr.
    """
    logger = logging.getLogger("mvssl")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    early = _Collector()
    handlers: list[logging.Handler]
    if rank == 0:
        handlers = [early, _ConsoleHandler(console)]
    else:
        handlers = [_ConsoleHandler(Console(stderr=True), level=logging.WARNING, prefix=f"rank {rank}: ")]
    for handler in handlers:
        logger.addHandler(handler)

    def open_file(path: Path) -> None:
        if rank:
            return
        file = _FileHandler(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(VisibleFormatter("%(asctime)s %(levelname)s %(message)s"))
        for record in early.records:
            file.handle(record)
        logger.removeHandler(early)
        logger.addHandler(file)
        handlers.append(file)
        if isinstance(console.file, SteadyStream):
            console.file.on_failure = lambda error: logger.warning(
                "the console is gone (%s): going on without it; %s has every line", error.strerror or error, path
            )

    try:
        yield open_file
    except Exception as error:
        logger.debug("stopped by %s: %s", type(error).__name__, error)
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.propagate = propagate


class _Collector(logging.Handler):
    """Keeps records until there is a file for them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _FileHandler(logging.FileHandler):
    """Writes to a file; if that fails, says so once on the console and goes on without it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name for it
        logger, error = logging.getLogger("mvssl"), sys.exc_info()[1]
        logger.removeHandler(self)
        why = describe_os_error(error) if isinstance(error, OSError) else f"{error}."
        logger.warning("%s cannot be written any more, the training goes on: %s", self.baseFilename, why)


class _ConsoleHandler(logging.Handler):
    """Prints messages; warnings and errors with their level."""

    def __init__(self, console: Console, *, level: int = logging.INFO, prefix: str = "") -> None:
        super().__init__(level)
        self._console = console
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        text = cell(self._prefix + record.getMessage())
        if record.levelno >= logging.WARNING:
            text = Text.assemble((f"{record.levelname.lower()}:", "yellow"), " ", text)
        gone = getattr(self._console.file, "failure", None) is not None
        if gone and record.levelno >= logging.WARNING:
            say(Console(file=steady(sys.stderr)), text)
        else:
            say(self._console, text)
