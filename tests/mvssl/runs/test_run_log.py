"""Log records of a run: on the console and in train.log."""

from __future__ import annotations

import io
import logging
from pathlib import Path

from rich.console import Console

from mvssl.runs.run_log import run_log
from tests.samples.data_faults import limited_files


def test_log_goes_to_file_and_console_and_leaves_no_handler(tmp_path: Path) -> None:
    text, logger = io.StringIO(), logging.getLogger("mvssl")
    before = list(logger.handlers)
    with run_log(Console(file=text, width=200)) as open_log:
        logger.info("before there is a file")
        open_log(tmp_path / "train.log")
        logger.debug("for the file")
        logging.getLogger("mvssl.data").warning("image [a/b.jpg] is bad")
    assert logger.handlers == before
    assert text.getvalue() == "before there is a file\nwarning: image [a/b.jpg] is bad\n"
    log = (tmp_path / "train.log").read_text()
    assert "for the file" in log
    assert log.count("INFO before there is a file") == 1
    assert "WARNING image [a/b.jpg] is bad" in log


def test_a_full_disk_ends_the_file_and_not_the_run(tmp_path: Path) -> None:
    text, logger = io.StringIO(), logging.getLogger("mvssl")
    with run_log(Console(file=text, width=500)) as open_log, limited_files(50):
        open_log(tmp_path / "train.log")
        for number in range(4):
            logger.info("a line of the log, number %d", number)
    lines = text.getvalue().splitlines()
    assert [line for line in lines if line.startswith("a line")] == [f"a line of the log, number {n}" for n in range(4)]
    (warning,) = (line for line in lines if line.startswith("warning"))
    assert "train.log cannot be written any more, the training goes on: File too large" in warning
