"""Names of others (files, classes, tasks, runs) as text for terminals, logs, pages, tables, shells and code."""

from __future__ import annotations

import logging
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is slow to import, and what only reads images does not need it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

NAME, MESSAGE = 40, 4000
"""Characters of a name in a table, legend or live display, and of a message."""
_ANY_WIDTH = 100_000  # columns

_SURROGATES = re.compile("[\ud800-\udfff]")
_NO_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte of a file name
_UNSEEN = re.compile(
    # Unicode's categories Cc, Cf, Zl and Zp: control characters, marks of direction, characters of no width, line ends
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\ufeff\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f"
    "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0]"  # letters and marks without a shape
)
_FORMULA = re.compile("\\s*[-=+@'\uff1d\uff0b\uff0d\uff20]")  # of spreadsheets, also in full width
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+]+):/+(?!/)(.*)", re.DOTALL)  # one letter is a drive of Windows


class Url(type(Path())):  # type: ignore[misc]  # the system's own kind of path, whatever that is
    """The URL of data, where paths go too: ``/`` appends a name, and its text has both slashes again.

    `Path` would make ``s3:/bucket`` of ``s3://bucket``. It names no file of this machine.
    """

    def __str__(self) -> str:
        found = _URL.fullmatch(super().__str__())
        return super().__str__() if found is None else f"{found[1]}://{found[2]}"

    def __fspath__(self) -> str:
        return str(self)

    @property
    def scheme(self) -> str:
        """What comes before the colon: ``s3``, ``https``, ..."""
        return str(self).partition(":")[0]

    def resolve(self, strict: bool = False) -> Url:
        """The URL itself."""
        del strict
        return self

    absolute = expanduser = resolve


def located(value: str | os.PathLike[str]) -> Path:
    """A `Url` for text or a path that is one (``s3://bucket/imagenet``), else the path; ``file:///data`` is a path."""
    found = _URL.fullmatch(os.fspath(value))
    if found is None:
        return Path(value)
    scheme = found[1].lower()
    return Path(f"/{found[2]}") if scheme == "file" else Url(f"{scheme}:/{found[2]}")


def utf8(text: str) -> str:
    """Text that UTF-8 can encode: bytes of file names that are not UTF-8 become escapes such as ``\\xe9``.

    Of text that comes from JSON, halves of surrogate pairs become escapes too, such as ``\\ud83d``.
    """
    if not _SURROGATES.search(text):
        return text
    text = _NO_BYTES.sub(_escape, text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def visible(text: str, limit: int = MESSAGE) -> str:
    """One line of text that shows every character and controls nothing: the form of names for people.

    As `utf8`, and control characters, line breaks, marks of direction and characters of no width become escapes
    such as ``\\n``, ``\\x1b`` and ``\\u202e``. Of more than `limit` characters the middle is left out. Visible text
    does not change.
    """
    return shortened(_UNSEEN.sub(_escape, utf8(text)), limit)


def shortened(text: str, limit: int) -> str:
    """Both ends of a text of more than `limit` characters, with an ellipsis between them."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


def csv_text(text: str) -> str:
    """A cell of a CSV table: `visible`, with ``'`` in front of what a spreadsheet would take for a formula.

    Also in front of another ``'``, so that the first one can be removed again. Numbers are written as numbers instead.
    """
    shown = visible(text, len(text) * 10)
    return f"'{shown}" if _FORMULA.match(shown) else shown


def shell_word(path: str) -> str:
    """A path as one word of a shell's command line (bash, zsh), which is no option either."""
    path = f"./{path}" if path.startswith("-") else path
    if not _UNSEEN.search(path) and not _SURROGATES.search(path):
        return shlex.quote(path)
    data = path.encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in data) + "'"


def python_text(text: str) -> str:
    """A string literal of Python in double quotes, in one line that shows every character."""
    quoted = text.replace("\\", r"\\").replace('"', r"\"")
    return f'"{_SURROGATES.sub(_escape, _UNSEEN.sub(_escape, quoted))}"'


def cell(text: str, limit: int = MESSAGE, *, style: str = "") -> Text:
    """Text for rich's tables and displays: `visible`, and not read as markup, emoji codes or numbers to colour."""
    from rich.text import Text

    shown = Text(visible(text, limit))
    if style:
        shown.stylize(style)
    return shown


def say(console: Console, *lines: str | Text, style: str = "") -> None:
    """Print lines (strings as `cell`) without wrapping, so that paths stay whole."""
    from rich.segment import Segments

    for line in lines:
        text = cell(line, style=style) if isinstance(line, str) else line
        console.print(Segments(text.render(console, end="\n")), soft_wrap=True)  # a Text would lose spaces at its end


def say_table(console: Console, table: Table) -> None:
    """Print a table of `cell`s; if no terminal limits its width, without wrapping."""
    from rich.segment import Segments

    options = console.options
    if not console.is_terminal:
        needed = console.measure(table, options=options.update(width=_ANY_WIDTH)).maximum
        options = options.update(width=max(console.width, needed))
    console.print(Segments(console.render(table, options)), soft_wrap=True)


class VisibleFormatter(logging.Formatter):
    """Formats a log record as one line, `visible`; only the traceback of an exception has further lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the base class has named it)
        record.message = visible(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802
        return "\n".join(map(visible, super().formatException(ei).split("\n")))  # type: ignore[arg-type]


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    code = ord(character)
    if code >= 0x80:  # \xe9 is a byte of a file name, so U+009B is \u009b
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return _SHORT.get(character, f"\\x{code:02x}")
