"""What every command-line program does around its body: an error becomes one sentence and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from pipelines.errors import InputError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count it

_REMEDIES = {
    errno.ENOSPC: "free some space there and run the same command again",
    errno.EDQUOT: "free some of your quota there and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run the same command again",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "change the permissions or choose another place",
    errno.EPERM: "change the permissions or choose another place",
    errno.ENOTDIR: "a file stands where a folder is needed; move it or choose another place",
    errno.EEXIST: "a file stands where a folder is needed; move it or choose another place",
    errno.EMFILE: "raise the limit on open files (ulimit -n) and run the same command again",
    errno.ENOENT: "check the path",
    errno.EIO: "check the disk",
}


def describe_os_error(error: OSError) -> str:
    """One sentence for an operating-system error: what happened, to which file, and what to do."""
    what = error.strerror or str(error) or type(error).__name__
    where = "" if error.filename is None else f" ({os.fsdecode(error.filename)})"
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{what}{where}: {remedy}." if remedy else f"{what}{where}."


def run_cli(body: Callable[[], int | None]) -> NoReturn:
    """Run `body` and leave the process with its exit code (None means 0).

    InputError and OSError are printed to stderr as ``error: <sentence>`` without a traceback (exit code 1); Ctrl-C
    exits with 130. Anything else is a bug of ours and keeps its traceback. Usage errors (exit code 2) are the
    argument parser's.
    """
    try:
        code = body() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_ERROR
    except OSError as error:
        print(f"error: {describe_os_error(error)}", file=sys.stderr)
        code = EXIT_ERROR
    except KeyboardInterrupt:
        print("error: interrupted; what was finished is kept.", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)
