"""The options of all commands are those in options.txt: a new or lost one is deliberate."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import tools.convert
from mvssl.cli import eval as eval_cli
from mvssl.cli import export as export_cli
from mvssl.cli import features as features_cli
from mvssl.cli import train as train_cli

LIST = Path(__file__).with_name("options.txt")
COMMANDS: dict[str, tuple[ModuleType, list[str]]] = {
    "mvssl-train": (train_cli, ["byol_resnet50_200ep", "--help-all"]),
    "mvssl-train report": (train_cli, ["report", "--help"]),
    "mvssl-eval knn": (eval_cli, ["knn", "--help"]),
    "mvssl-eval linear": (eval_cli, ["linear", "--help"]),
    "mvssl-eval finetune": (eval_cli, ["finetune", "--help"]),
    "mvssl-eval compare": (eval_cli, ["compare", "--help"]),
    "mvssl-features": (features_cli, ["--help"]),
    "mvssl-export": (export_cli, ["--help"]),
    "mvssl-convert": (tools.convert, ["--help"]),
}


def options(text: str) -> list[str]:
    """Options and positional arguments that begin a line of a help text, inside of tyro's boxes or not."""
    return re.findall(r"^[│ ]{1,3}(--[a-z][\w.-]*|[A-Z]{3,}(?= |$))", text, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_those_of_the_list(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, arguments = COMMANDS[command]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(SystemExit):
        module.main()
    now = [f"{command}: {option}" for option in options(capsys.readouterr().out)]
    assert now, "the reader is blind"
    listed = [line for line in LIST.read_text().splitlines() if line.startswith(f"{command}: ")]
    assert now == listed, f"if this is meant, put these lines into {LIST.name}:\n" + "\n".join(now)
