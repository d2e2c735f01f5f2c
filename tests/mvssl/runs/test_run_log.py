"""Log records of a run: on the console and in train.log."""

from __future__ import annotations

import io
import logging
from pathlib import Path

from rich.console import Console

from mvssl.runs.run_log import run_log


def test_log_goes_to_file_and_console_and_leaves_no_handler(tmp_path: Path) -> None:
    text, logger = io.StringIO(), logging.getLogger("mvssl")
    before = list(logger.handlers)
    with run_log(tmp_path / "train.log", Console(file=text, width=200)):
        logger.debug("for the file")
        logging.getLogger("mvssl.data").warning("image [a/b.jpg] is bad")
    assert logger.handlers == before
    assert text.getvalue() == "warning: image [a/b.jpg] is bad\n"
    log = (tmp_path / "train.log").read_text()
    assert "for the file" in log
    assert "WARNING image [a/b.jpg] is bad" in log
