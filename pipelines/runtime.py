"""What every command-line program does around its body: an error becomes one sentence and an exit code.

The one error type for what a user can put right.

Where things lie that can be made again: indexes of folders, compiled code.

Builds C with the machine's compiler, once per source, compiler and processor, into the user's cache.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
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


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mvssl``, else ``~/.cache/mvssl``, else ``mvssl-<uid>`` among the temporary files.

    It need not exist.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "mvssl"
    try:
        return Path.home() / ".cache" / "mvssl"
    except RuntimeError:  # no HOME, and a user id without a name: usual in containers
        return Path(tempfile.gettempdir()) / f"mvssl-{os.getuid()}"


# No contraction: a fused multiply-add would round differently from the reference. No traps or errno: lets it vectorise.
_OPTIONS = ("-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TIMEOUT = 120  # seconds


@functools.cache
def load_library(source: Path) -> ctypes.CDLL | str:
    """The library built from one C file, or why there is none. Building takes seconds, the first time on a machine."""
    compiler = _compiler()
    if compiler is None:
        return "no C compiler was found (install gcc, or name one in CC)"
    try:
        return ctypes.CDLL(str(_built(source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return f"{shlex.join(compiler)} could not build it ({output.strip().splitlines()[0]})"


def _compiler() -> list[str] | None:
    """The command of the C compiler: CC, or the first of the usual names."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def _built(source: Path, compiler: list[str]) -> Path:
    """Path of the library, which is built if it is not in the cache.

    Raises:
        OSError: it cannot be written.
        subprocess.SubprocessError: it cannot be built.
    """
    version = _run([*compiler, "--version"])
    key = hashlib.sha256(repr((_text(source), _OPTIONS, compiler, version, _processor())).encode()).hexdigest()
    library = cache_folder() / f"{source.stem}-{key[:32]}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            aside = Path(folder) / library.name
            build = [*compiler, *_OPTIONS, str(source), "-o", str(aside), "-lm"]
            try:
                _run([*build, "-march=native"])
            except subprocess.CalledProcessError:  # not every compiler knows every machine
                _run(build)
            aside.replace(library)
    return library


def _text(source: Path) -> list[bytes]:
    """A C file and the files that it includes by a relative name."""
    text = source.read_bytes()
    included = re.findall(rb'^#include "(.+)"$', text, re.MULTILINE)
    return [text, *(part for name in included for part in _text(source.parent / name.decode()))]


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT).stdout


def _processor() -> str:
    """What -march=native depends on: caches may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))


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
