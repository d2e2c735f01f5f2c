"""Names of others as text: nothing in them controls what shows them, and what is shown can be read back."""

from __future__ import annotations

import ast
import csv
import io
import logging
import os
import re
import subprocess
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from pipelines.names import VisibleFormatter, cell, csv_text, python_text, say, say_table, shell_word, utf8, visible
from pipelines.progress import Progress
from pipelines.runtime import InputError, invalid, parse_arguments
from tests.samples.hostile_names import PIECES, names, read_back, unseen

ALL = "".join(PIECES)
ROOT = Path(__file__).resolve().parents[2]


@given(names)
def test_visible_text_shows_every_character(name: str) -> None:
    shown = visible(name, len(name) * 10)
    shown.encode()
    assert unseen(shown) == []
    assert visible(shown, len(shown)) == shown
    if not unseen(name) and name.isprintable():
        assert shown == name
    if "\\" not in name and not any("\udc80" <= c <= "\udcff" for c in name):
        assert read_back(shown) == name


def test_bytes_and_characters_are_told_apart() -> None:
    assert visible(os.fsdecode(b"caf\xe9 \x9b") + "é\x9b\n") == r"caf\xe9 \x9bé\u009b\n"
    assert utf8(os.fsdecode("é\n".encode("latin-1")) + "\ud83d\x1b") == "\\xe9\n\\ud83d\x1b"


@given(names, st.integers(1, 60))
def test_long_names_keep_both_ends(name: str, limit: int) -> None:
    whole, shown = visible(name, len(name) * 10), visible(name, limit)
    assert len(shown) <= limit
    head, _, tail = shown.partition("…") if len(whole) > limit else (whole, "", "")
    assert whole.startswith(head)
    assert whole.endswith(tail)


@given(st.lists(names, min_size=1))
@example(list(PIECES))
def test_tables_of_names_read_back_and_are_no_formulas(columns: list[str]) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerow([-1, *map(csv_text, columns)])
    assert unseen(file.getvalue(), lines=True) == []
    assert file.getvalue().count("\n") == 1
    number, *cells = next(csv.reader(io.StringIO(file.getvalue(), newline="")))
    assert number == "-1"
    for text, name in zip(cells, columns, strict=True):
        assert unicodedata.normalize("NFKC", text.lstrip()[:1]) not in ("=", "+", "-", "@")  # OWASP, CSV injection
        assert text.removeprefix("'") == visible(name, 10**6)


@settings(max_examples=25)
@given(
    st.lists(names.filter(lambda name: name != "" and "\0" not in name and len(name) < 1000), min_size=1, max_size=8)
)
@example([piece for piece in PIECES if "\0" not in piece and piece != "\ud83d" and len(piece) < 1000])
def test_shells_read_words_back(paths: list[str]) -> None:
    try:
        expected = [os.fsencode(path) for path in paths]
    except UnicodeEncodeError:
        assume(False)
    words = " ".join(map(shell_word, paths))
    assert unseen(words) == []
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True)
    read = done.stdout.split(b"\0")[:-1]
    assert [word.removeprefix(b"./") for word in read] == [word.removeprefix(b"./") for word in expected]
    assert not any(word.startswith(b"-") for word in read)


@given(names)
@example(ALL)
def test_python_reads_literals_back(name: str) -> None:
    literal = python_text(name)
    assert unseen(literal) == []
    assert ast.literal_eval(literal) == name


def console(*, terminal: bool, width: int = 30) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, legacy_windows=False)


def printed(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


@given(names, st.booleans())
@example(ALL, True)
@example("b" * 40 + "   ", False)
def test_consoles_show_the_visible_form(name: str, terminal: bool) -> None:
    """Whole, in one line, also beyond the console's width."""
    to = console(terminal=terminal)
    say(to, f"a {name}", style="yellow")
    assert printed(to) == visible(f"a {name}") + "\n"


@given(names)
@example(ALL)
def test_tables_outside_terminals_keep_names_whole(name: str) -> None:
    to = console(terminal=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row(cell(f"<{name}>"), cell("|"))
    say_table(to, table)
    assert " ".join(printed(to).split()) == " ".join(f"{visible(f'<{name}>')} |".split())


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_names(terminal: bool) -> None:
    for name in (*PIECES, ALL):
        to = console(terminal=terminal, width=200)
        with Progress(to, f"indexing {name}", total=2) as progress:
            progress.update(2, note=name)
        if not terminal:
            Progress(to, f"indexing {name}", total=1).update(1)
        text = re.sub(r"\x1b\[(\?25[lh]|2K|1A)|\r", "", printed(to))  # the bar hides the cursor and erases its lines
        assert unseen(text, lines=True) == []
        assert len(name) > 60 or f"indexing {visible(name)}" in text


@given(names)
@example(ALL)
def test_a_log_record_is_one_line(name: str) -> None:
    record = logging.LogRecord("mvssl", logging.WARNING, __file__, 1, "image %s is bad", (name,), None)
    assert VisibleFormatter("%(levelname)s %(message)s").format(record) == f"WARNING {visible(f'image {name} is bad')}"
    record.msg, record.args = name, None
    assert unseen(VisibleFormatter().format(record)) == []


def test_only_a_traceback_has_more_lines() -> None:
    try:
        raise ValueError("a\x1b[31m")
    except ValueError:
        record = logging.LogRecord("mvssl", logging.ERROR, __file__, 1, "it\nfailed", (), sys.exc_info())
    first, *rest = VisibleFormatter().format(record).split("\n")
    assert first == r"it\nfailed"
    assert rest[-1] == r"ValueError: a\x1b[31m"


@given(names)
@example(ALL)
def test_errors_are_sentences_of_visible_text(name: str) -> None:
    for error in (InputError(f"{name} does not exist: check it."), invalid("name", name, "short", "shorten it")):
        assert unseen(str(error)) == []
        assert len(str(error)) <= 4000
    assert len(str(invalid("name", "x" * 10**6, "short", "shorten it"))) < 1500


@dataclass(frozen=True, kw_only=True)
class Words:
    """Words of a command."""

    number: int = 1
    name: str = "a"


@pytest.mark.parametrize("words", [["--number", ALL], [f"--{ALL}"], [ALL], ["--help"]])
def test_usage_errors_and_help_are_visible(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.replace("\0", "") for word in words]
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Words, args=words, default=Words(name=ALL), prog=f"words {ALL}")
    assert stopped.value.code == (0 if words == ["--help"] else 2)
    shown = capsys.readouterr()
    assert shown.out if words == ["--help"] else shown.err
    assert unseen(shown.out + shown.err, lines=True) == []
    assert parse_arguments(Words, args=["--name", ALL]).name == ALL


def test_commands_without_a_log_warn_in_visible_text() -> None:
    name = "[/x]\x1b[31m\n\u202e%s"
    code = (
        "import logging, sys; from pipelines.runtime import InputError, run_cli\n"
        "def body():\n"
        "    logging.getLogger('mvssl.data').warning('%s is empty', sys.argv[1])\n"
        "    raise FileNotFoundError(2, 'No such file', sys.argv[1])\n"
        "run_cli(body)"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=False)
    shown = r"[/x]\x1b[31m\n\u202e%s"
    assert done.stderr == f"{shown} is empty\nerror: No such file ({shown}): check the path.\n"
    assert done.returncode == 1


def is_safe(node: ast.expr) -> bool:
    """Whether what is printed is ours, or has gone through `visible`."""
    if isinstance(node, ast.Starred):
        return is_safe(node.value)
    if isinstance(node, ast.JoinedStr):
        return all(is_safe(part.value if isinstance(part, ast.FormattedValue) else part) for part in node.values)
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        return called in ("visible", "json.dumps") or (called == "map" and ast.unparse(node.args[0]) == "visible")
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id.isupper())


def printed_past_names(source: str) -> list[str]:
    """The prints of Python code that could show the name of something as it is."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    prints = [call for call in calls if ast.unparse(call.func) == "print" and not all(map(is_safe, call.args))]
    of_rich = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "print"]
    return [f"{call.lineno}: {ast.unparse(call)}" for call in (*prints, *of_rich)]


def test_the_reader_sees_what_prints_names() -> None:
    code = "print('a', USAGE, json.dumps(x), *map(visible, y))\nprint(f'{visible(a)} b')\nsay(console, a)\n"
    assert printed_past_names(code) == []
    assert len(printed_past_names("print(a)\nprint(f'{a}')\nprint(*a)\nconsole.print('a')\nprint(str(visible))")) == 5


@pytest.mark.parametrize("package", ["pipelines", "mvssl", "tools"])
def test_everything_is_printed_through_names(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        if path != ROOT / "pipelines" / "names.py":
            assert printed_past_names(path.read_text(encoding="utf-8")) == [], path
