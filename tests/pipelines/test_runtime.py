"""Error messages and exit codes of command-line programs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from pipelines.runtime import InputError, SteadyStream, run_cli


def failing(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("x is 3 but must be 4: say 4."), 1, "error: x is 3 but must be 4: say 4.\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out/file"),
            1,
            "error: No space left on device (/out/file); 0.5 GB of 2.0 GB are free on the disk of /: free some space "
            "there and run the same command again.\n",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), b"/out"),
            1,
            "error: Permission denied (/out): change the permissions or choose another place.\n",
        ),
        (OSError("odd"), 1, "error: odd.\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; what was finished is kept.\n"),
    ],
)
def test_errors_are_one_sentence(
    error: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5e8, total=2e9))
    with pytest.raises(SystemExit) as leaving:
        run_cli(failing(error))
    assert leaving.value.code == code
    assert capsys.readouterr().err == message


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli(failing(ZeroDivisionError()))


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (75, 75)])
def test_exit_code_of_the_body(returned: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as leaving:
        run_cli(lambda: returned)
    assert leaving.value.code == code


def test_a_stream_without_a_reader_drops_its_text_and_says_so_once() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    reasons: list[int | None] = []
    with open(writing, "w") as file:
        stream = SteadyStream(file)
        stream.on_failure = lambda error: reasons.append(error.errno)
        for _ in range(3):
            assert stream.write("lost\n") == 5
            stream.flush()
    assert reasons == [errno.EPIPE]
    assert stream.failure is not None


def test_characters_that_the_encoding_lacks_become_escapes(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "out.txt")
    with open(path, "w", encoding="ascii") as file:
        SteadyStream(file).write("caf\xe9 \udce9\n")
    with open(path) as file:
        assert file.read() == "caf\\xe9 \\udce9\n"


PRINTS = "from pipelines.runtime import run_cli; run_cli(lambda: print('result'))"


@pytest.mark.parametrize(
    ("redirection", "code", "says"),
    [("| true", 0, ""), ("> /dev/full", 1, "No space left on device"), (">&- 2>&-", 0, "")],
    ids=["pipe", "full", "closed"],
)
def test_a_result_that_cannot_be_printed_is_an_error_unless_nobody_reads_it(
    redirection: str, code: int, says: str
) -> None:
    ran = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {redirection}', sys.executable, PRINTS],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == code
    assert says in ran.stderr
    assert "Exception" not in ran.stderr


def test_closed_streams_are_opened_on_the_null_device() -> None:
    """Otherwise the next file to be opened has the descriptor of stderr, and libraries print into it."""
    code = (
        "import sys; from pipelines.runtime import run_cli\n"
        "def body():\n"
        "    with open(sys.argv[1], 'w') as file: return 40 + file.fileno()\n"
        "run_cli(body)"
    )
    ran = subprocess.run(["bash", "-c", '"$0" -c "$1" /dev/null <&- >&- 2>&-', sys.executable, code])
    assert ran.returncode == 43
