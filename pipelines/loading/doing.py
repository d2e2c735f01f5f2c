"""What the loader's threads are at, for the words about what goes wrong or hangs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import InputError

_log = logging.getLogger("mvssl.data")


class Doing:
    """Which batch each stage is at. Stages run in threads of their own."""

    def __init__(self, location: Path) -> None:
        """`location` is where the images are."""
        self._location = location
        self._batches: dict[str, str] = {}  # by stage

    @contextmanager
    def during(self, stage: str, *, epoch: int, step: int) -> Iterator[None]:
        """Note what is being done to which batch, and name it in what goes wrong unexpectedly."""
        batch = f"batch {step} of epoch {epoch} of {self._location}"
        self._batches[stage] = batch
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            error.add_note(f"while {batch} was prepared")
            raise
        finally:
            del self._batches[stage]

    def complain(self, seconds: float) -> None:
        """Say that no batch has come for so long, and what it hangs on."""
        doing = " and ".join(f"{stage} {batch}" for stage, batch in self._batches.copy().items()) or "doing nothing"
        _log.warning(
            "No batch has come for %.0f s: the loader is %s. If that does not end, a disk or network does not answer "
            "or the decoder hangs (--decoder pillow does without other libraries); stop the run and --resume it.",
            seconds,
            doing,
        )
