"""Errors for users, and how commands print them and exit."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, cast

from pipelines import usage
from pipelines.names import VisibleFormatter, shortened, visible

T = TypeVar("T")
_LONGEST_SHOWN = 1000  # characters of a value or path in a message


class InputError(ValueError):
    """A value, file or folder given by the user cannot be used; the message is a sentence with the remedy.

    The message is `visible`, whatever names are in it. Command-line programs print it without a traceback and exit with
    code 1.

    Attributes:
        field: name of the field or option that is wrong, e.g. "Recipe.epochs"; None if it is no single one.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(visible(message))
        self.field = field


def invalid(field: str, value: object, allowed: str, remedy: str) -> InputError:
    """The error "FIELD is VALUE but must be ALLOWED: REMEDY."

    Args:
        field: name of the field as the user writes it, e.g. "ViewSpec.size".
        value: the value that was given.
        allowed: continues "must be".
        remedy: an imperative without a full stop.
    """
    return InputError(f"{field} is {shown(value)} but must be {allowed}: {remedy}.", field=field)


def shown(value: object) -> str:
    """A value as Python writes it, cut if it is long: values may come from files of others."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits, or lists in lists in lists
        return f"too large a value ({type(value).__name__})"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN // 2]}... ({len(text):,} characters)"


def empty_path(field: str) -> InputError:
    """The error for an empty text given as a path, which would be the current folder."""
    return invalid(field, "", "a path", "check that the variable that was to hold it is set")


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
    errno.ENAMETOOLONG: "choose a shorter name",
}


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk or quota that is full."""


def describe_os_error(error: OSError) -> str:
    """A sentence about an operating-system error: what happened, to which file, and a remedy."""
    what = error.strerror or str(error) or type(error).__name__
    where = "" if error.filename is None else f" ({shortened(os.fsdecode(error.filename), _LONGEST_SHOWN)})"
    if error.errno in FULL and error.filename is not None:
        where += f"; {describe_free(Path(os.fsdecode(error.filename)))}"
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{what}{where}: {remedy}." if remedy else f"{what}{where}."


def describe_free(path: Path) -> str:
    """How much is free where `path` is or would be: "0.3 GB of 250.0 GB are free on the disk of /data"."""
    folder = next((part for part in (path, *path.absolute().parents) if part.exists()), Path("/"))
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return f"the disk of {folder}"
    return f"{usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB are free on the disk of {folder}"


class _EmptyPath(Exception):
    """An argument that is to be a path is empty."""


def parse_arguments(kind: type[T], *, args: Sequence[str] | None = None, **settings: Any) -> T:
    """The command line as a `kind`, by `tyro.cli` with these settings; every command parses with this.

    Args:
        kind: the dataclass of the arguments.
        args: the words; by default those of the process.
        settings: of `tyro.cli`.

    Raises:
        InputError: a path is empty, which would be the current folder.
        SystemExit: with code 2 for wrong usage, 0 after printing help.
    """
    import tyro  # not needed by what only trains or decodes

    def path(words: list[str]) -> Path:
        if not words[0].strip():
            raise _EmptyPath
        return Path(words[0])

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def paths(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=path,
            is_instance=lambda value: hasattr(value, "__fspath__"),
            str_from_instance=lambda value: [str(value)],
        )

    words = sys.argv[1:] if args is None else list(args)
    prog = settings.get("prog") or Path(sys.argv[0]).name
    try:
        return _visibly(lambda words: cast(T, tyro.cli(kind, args=words, registry=registry, **settings)), words, prog)
    except _EmptyPath:
        raise empty_path(usage.empty_argument(words)) from None


def _visibly(parse: Callable[[list[str]], T], words: list[str], prog: str) -> T:
    """What `parse` returns of the words; the help that it prints and exits with is `visible`.

    Words that the command `prog` cannot use, and values that a dataclass refuses, are reported in one sentence.
    """
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            return parse(words)
    except SystemExit as stop:
        sentence = usage.sentence(err.getvalue(), words, prog, lambda: _help_of(parse)) if stop.code else ""
        if sentence:
            print(visible(f"error: {sentence}"), file=sys.stderr)
            raise
        printed = [(stream, text.getvalue()) for stream, text in ((sys.stdout, out), (sys.stderr, err))]
        plain = [(stream, "\n".join(map(visible, text.split("\n")))) for stream, text in printed]
        if plain == printed:
            return parse(words)  # again, in the colours and width of the terminal
        for stream, text in plain:
            stream.write(text)
        raise


def _help_of(parse: Callable[[list[str]], object]) -> str:
    text = io.StringIO()
    with suppress(SystemExit), redirect_stdout(text):
        parse(["--help"])
    return text.getvalue()


class SteadyStream(io.TextIOBase):
    """Standard output or error that may go away: a closed pipe or terminal, or a full disk behind a redirection.

    Text that cannot be written is dropped, from the first failure on, and the program continues. Characters that the
    encoding lacks are written as escapes.

    Attributes:
        failure: why nothing is written any more; None as long as all is well.
        on_failure: called once with that reason; who sets it tells the user, and results do not depend on the stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        self.on_failure: Callable[[OSError], None] | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write `text`, or drop it; the number of its characters either way."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is buffered."""
        self._attempt(self._stream.flush)

    def _attempt(self, operation: Callable[[], object]) -> None:
        if self.failure is not None:
            return
        try:
            operation()
        except OSError as error:
            self.failure = error
            with suppress(OSError, ValueError):  # what is buffered, and what libraries print, goes nowhere
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            if self.on_failure is not None:
                self.on_failure(error)

    def fileno(self) -> int:
        """File descriptor of the stream."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """True: text may be written at any time."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream."""
        return self._stream.encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady(stream: TextIO) -> TextIO:
    """The stream as a `SteadyStream`."""
    return stream if isinstance(stream, SteadyStream) else cast("TextIO", SteadyStream(stream))


def _keep_standard_streams() -> None:
    """Open closed standard streams on the null device, lest the next file be opened in their place, and steady them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is `number`
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    sys.stdout, sys.stderr = steady(sys.stdout), steady(sys.stderr)


def run_cli(body: Callable[[], int | None]) -> NoReturn:
    """Run `body` and exit with its code (None means 0).

    InputError and OSError are printed to stderr as "error: SENTENCE" without a traceback (exit code 1); Ctrl-C exits
    with 130. Other exceptions are bugs and keep their traceback. The argument parser exits with 2 for usage errors.
    Output that nobody reads any more stops nothing; if it could not be written for another reason, such as a full disk,
    the exit code is 1. `--version` as the only argument prints the version.
    """
    _keep_standard_streams()
    if sys.argv[1:] == ["--version"]:
        body = _print_version
    warnings.filterwarnings(
        "ignore", module=r"PIL\."
    )  # about metadata, without the file's name; mvssl-convert lists them
    if logging.lastResort is not None:  # prints the warnings of commands without a log
        logging.lastResort.setFormatter(VisibleFormatter())
    try:
        code = body() or 0
    except InputError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        code = EXIT_ERROR
    except OSError as error:
        print(f"error: {visible(describe_os_error(error))}", file=sys.stderr)
        code = EXIT_ERROR
    except KeyboardInterrupt:
        print("error: interrupted; what was finished is kept.", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code or _output_code())


def _print_version() -> None:
    print(visible(f"mvssl {installed_version()}"))


def installed_version() -> str:
    """Version of the installed mvssl; "unknown (not installed)" in a clone that pip knows nothing of."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mvssl")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _output_code() -> int:
    """Exit code of a command that succeeded: 1 if standard output was to hold its result but could not be written."""
    sys.stdout.flush()
    stream: Any = sys.stdout
    failure = stream.failure if isinstance(stream, SteadyStream) else None
    if failure is None or failure.errno == errno.EPIPE or stream.on_failure is not None:
        return 0
    print(f"error: standard output could not be written: {visible(describe_os_error(failure))}", file=sys.stderr)
    return EXIT_ERROR
