"""Error messages and exit codes of command-line programs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from pipelines.runtime import InputError, run_cli


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
            "error: No space left on device (/out/file): free some space there and run the same command again.\n",
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
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
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
