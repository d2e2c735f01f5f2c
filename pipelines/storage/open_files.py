"""The limit on open files (``ulimit -n``): a shard stays open, and often only 1024 may be."""

from __future__ import annotations

import resource

_SPARE = 256  # for everything else in the process: libraries, logs, sockets, image files


def make_room(descriptor: int) -> None:
    """Raise this process's soft limit, up to the hard one, if few descriptors are left above the one just opened.

    The system gives out the lowest free descriptor, so that `descriptor` tells how many are in use. Does nothing where
    the limit cannot be raised: then opening fails in the end, with the system's own error.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or descriptor + _SPARE < soft:
        return
    wanted = 2 * (descriptor + _SPARE)
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    except (ValueError, OSError):  # a system with a limit of its own below the hard one (macOS)
        return


def most_open_files() -> int | None:
    """How many files may be kept open with some left to spare; None if there is no limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if hard == resource.RLIM_INFINITY else max(1, hard - _SPARE)
