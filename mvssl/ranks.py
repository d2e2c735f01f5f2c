"""Which of torchrun's processes this one is, and its exit code: what is known without torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pipelines.names import visible
from pipelines.runtime import EXIT_ERROR, InputError


class OtherRankFailed(Exception):
    """Another rank failed, and reports the reason itself, or it is gone."""


def rank_count() -> int:
    """Number of ranks of this run, from torchrun's environment variables; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Rank of this process, from torchrun's environment variables; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def process_local_rank() -> int | None:
    """Rank of this process on its host, from torchrun's environment variables; None in a single process."""
    number = os.environ.get("LOCAL_RANK")
    return None if rank_count() == 1 or number is None else int(number)


def exit_code_of_rank(command: Callable[[], int | None]) -> int:
    """Run a command that torchrun may have started on several ranks; its exit code (None is 0).

    Only rank 0 reports the failure of another rank. An InputError names the rank if it is not rank 0.
    """
    try:
        return command() or 0
    except OtherRankFailed as failure:
        if process_rank() == 0:
            print(f"error: {visible(str(failure))}", file=sys.stderr)
        return EXIT_ERROR
    except InputError as error:
        if process_rank() == 0:
            raise
        raise InputError(f"on rank {process_rank()}: {error}") from error
