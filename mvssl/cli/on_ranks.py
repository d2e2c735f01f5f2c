"""Commands that torchrun may start several times: what goes wrong is said once."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mvssl.distributed import FailedElsewhere, process_rank
from pipelines.console import EXIT_ERROR
from pipelines.errors import InputError


def main_speaks(work: Callable[[], None]) -> int:
    """Do the work of a command on this rank; returns the exit code.

    Raises:
        InputError: it failed; ranks other than 0 say which they are.
    """
    try:
        work()
    except FailedElsewhere as failure:
        if process_rank() == 0:
            print(f"error: {failure}", file=sys.stderr)
        return EXIT_ERROR
    except InputError as error:
        if process_rank() == 0:
            raise
        raise InputError(f"on rank {process_rank()}: {error}") from error
    return 0
