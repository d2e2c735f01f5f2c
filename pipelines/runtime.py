"""Errors for users, and how commands print them and exit."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """A value, file or folder given by the user cannot be used; the message is a sentence with the remedy.

    Command-line programs print the message without a traceback and exit with code 1.

    Attributes:
        field: name of the field or option that is wrong, e.g. "Recipe.epochs"; None if it is no single one.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def invalid(field: str, value: object, allowed: str, remedy: str) -> InputError:
    """The error "FIELD is VALUE but must be ALLOWED: REMEDY."

    Args:
        field: name of the field as the user writes it, e.g. "ViewSpec.size".
        value: the value that was given.
        allowed: continues "must be".
        remedy: an imperative without a full stop.
    """
    return InputError(f"{field} is {value!r} but must be {allowed}: {remedy}.", field=field)


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
    """A sentence about an operating-system error: what happened, to which file, and a remedy."""
    what = error.strerror or str(error) or type(error).__name__
    where = "" if error.filename is None else f" ({os.fsdecode(error.filename)})"
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{what}{where}: {remedy}." if remedy else f"{what}{where}."


def run_cli(body: Callable[[], int | None]) -> NoReturn:
    """Run `body` and exit with its code (None means 0).

    InputError and OSError are printed to stderr as "error: SENTENCE" without a traceback (exit code 1); Ctrl-C exits
    with 130. Other exceptions are bugs and keep their traceback. The argument parser exits with 2 for usage errors.
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
