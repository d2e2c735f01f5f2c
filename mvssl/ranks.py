"""Which of torchrun's processes this one is, and its exit code: what is known without torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.names import visible
from pipelines.runtime import EXIT_ERROR, EXIT_INTERRUPTED, InputError, invalid

LAUNCHED = "MVSSL_LAUNCHED"
"""Environment variable of the processes that --devices starts: JSON with their arguments and a folder for answers."""


PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl(2): the signal that a process gets when its parent ends."""


class OtherRankFailed(Exception):
    """Another rank failed, and reports the reason itself, or it is gone."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What --devices asks for.

    Attributes:
        count: number of devices; None for all.
        indices: their numbers among the visible ones; None for the first ones.
    """

    count: int | None = None
    indices: tuple[int, ...] | None = None


def asked_devices(text: str) -> Devices:
    """The devices of a text: a number of them, their numbers with commas, or all.

    Raises:
        InputError: it is none of these.
    """
    if text == "all":
        return Devices()
    words = [word.strip() for word in text.removesuffix(",").split(",")]
    if all(word.isascii() and word.isdecimal() and len(word) < 6 for word in words):
        numbers = tuple(map(int, words))
        if "," in text and len(set(numbers)) == len(numbers):
            return Devices(count=len(numbers), indices=numbers)
        if "," not in text and numbers[0] > 0:
            return Devices(count=numbers[0])
    raise invalid(
        "RunOptions.devices",
        text,
        "a number of devices, different numbers of GPUs with commas, or all",
        "write 8, or 0,1,3, or '0,' for the first GPU alone",
    )


def started_by_torchrun() -> bool:
    """Whether torchrun, or another launcher with its environment variables, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or ("WORLD_SIZE" in os.environ and "RANK" in os.environ)


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

    Only rank 0 reports the failure of another rank. An InputError names the rank if it is not rank 0. In a process that
    --devices has started, the code is left for the starting process, and this one ends with 0 if it has nothing to
    report itself: the others are ended as soon as one fails, and must not be while one of them still saves or reports.
    """
    given = os.environ.get(LAUNCHED)
    if given is None:
        return _exit_code(command)
    answer = Path(json.loads(given)["folder"]) / f"{process_rank()}.code"
    answer.with_suffix(".begun").touch()
    try:
        code = _exit_code(command)
    except KeyboardInterrupt:
        if process_rank() == 0:
            raise
        code = EXIT_INTERRUPTED
    answer.write_text(str(code))
    return 0


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether torch's communication failed, as it does when another rank is gone."""
    return "gloo/transport" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError")


def _exit_code(command: Callable[[], int | None]) -> int:
    """As `exit_code_of_rank`, for one process or those of torchrun."""
    try:
        return command() or 0
    except OtherRankFailed as failure:
        if process_rank() == 0 and LAUNCHED not in os.environ:  # else the starting process reports it
            print(f"error: {visible(str(failure))}", file=sys.stderr)
        return EXIT_ERROR
    except RuntimeError as error:
        if LAUNCHED not in os.environ or not _is_lost_connection(error):
            raise
        return EXIT_ERROR
    except InputError as error:
        if process_rank() == 0:
            raise
        raise InputError(f"on rank {process_rank()}: {error}") from error
