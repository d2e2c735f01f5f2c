"""How long a run may take, as people write it."""

from __future__ import annotations

import re

from pipelines.errors import invalid

_FORM = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")  # as SLURM writes it
_SECONDS = (86_400, 3_600, 60, 1)


def parse_time(text: str) -> int:
    """Seconds of a duration such as 7h30m, 90m, 1d12h, 45s, 12:00:00 or 1-12:00:00.

    Raises:
        InputError: it is none, or zero.
    """
    found = _CLOCK.fullmatch(text) or _FORM.fullmatch(text)
    seconds = (
        0 if found is None else sum(int(part or 0) * of for part, of in zip(found.groups(), _SECONDS, strict=True))
    )
    if not seconds:
        raise invalid("RunOptions.time", text, "a duration such as 7h30m or 12:00:00", "write hours, minutes, seconds")
    return seconds
