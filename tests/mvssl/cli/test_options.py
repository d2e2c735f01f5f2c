"""Options of all commands, with their choices, are those in options.txt, so that a new or lost one is deliberate."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tyro

import mvssl
from mvssl.cli import convert as convert_cli
from mvssl.cli import eval as eval_cli
from mvssl.cli import export as export_cli
from mvssl.cli import features as features_cli
from mvssl.cli import train as train_cli
from mvssl.config.options import RunOptions
from mvssl.evaluate.session import EvalOptions
from mvssl.weights.load import BackboneSource
from pipelines.runtime import InputError
from pipelines.storage import open_source, split_paths

LIST = Path(__file__).with_name("options.txt")
COMMANDS: dict[str, tuple[ModuleType, list[str]]] = {
    "mvssl-train RECIPE": (train_cli, ["byol_resnet50_200ep"]),
    "mvssl-train doctor": (train_cli, ["doctor"]),
    "mvssl-train report": (train_cli, ["report"]),
    "mvssl-train runs": (train_cli, ["runs"]),
    "mvssl-eval knn": (eval_cli, ["knn"]),
    "mvssl-eval linear": (eval_cli, ["linear"]),
    "mvssl-eval finetune": (eval_cli, ["finetune"]),
    "mvssl-eval compare": (eval_cli, ["compare"]),
    "mvssl-eval neighbours": (eval_cli, ["neighbours"]),
    "mvssl-eval scatter": (eval_cli, ["scatter"]),
    "mvssl-eval attention": (eval_cli, ["attention"]),
    "mvssl-features": (features_cli, []),
    "mvssl-export": (export_cli, []),
    "mvssl-convert": (convert_cli, []),
}


class Listed(Exception):
    """Ends a command where it would parse its arguments."""


def options(command: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Positional arguments in order, then options sorted, of the parser that a command uses."""
    lines: list[str] = []

    def list_options(kind: Any, *, args: object, **settings: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no successor of get_parser
            actions = tyro.extras.get_parser(kind, **settings)._actions
        lines.extend(action.dest.upper() for action in actions if not action.option_strings)
        lines.extend(
            sorted(" ".join([*a.option_strings, a.metavar or ""]).strip() for a in actions if a.option_strings)
        )
        raise Listed

    module, arguments = COMMANDS[command]
    monkeypatch.setattr(tyro, "cli", list_options)
    monkeypatch.setattr(sys, "argv", [command.split()[0], *arguments])
    with pytest.raises(Listed):
        module.main()
    return [f"{command}: {line}" for line in lines]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_those_of_the_list(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = options(command, monkeypatch)
    listed = [line for line in LIST.read_text().splitlines() if line.startswith(f"{command}: ")]
    assert now == listed, f"if this is deliberate, replace the lines of {command} in {LIST.name} by:\n" + "\n".join(now)


def test_the_list_has_no_other_commands() -> None:
    assert {line.partition(": ")[0] for line in LIST.read_text().splitlines()} == set(COMMANDS)


WITH: dict[str, list[str]] = {  # what else a command needs
    "mvssl-eval knn": ["--run", "r"],
    "mvssl-eval linear": ["--run", "r"],
    "mvssl-eval finetune": ["--run", "r"],
    "mvssl-eval compare": ["r"],
    "mvssl-eval neighbours": ["--run", "r"],
    "mvssl-eval scatter": ["--run", "r"],
    "mvssl-eval attention": ["--run", "r"],
    "mvssl-features": ["i", "o.npy", "--run", "r"],
    "mvssl-export": ["--run", "r", "--out", "o"],
    "mvssl-convert": ["s", "d"],
    "mvssl-train report": ["r"],
    "mvssl-train runs": ["r"],
}
PATHS = [line.partition(": ") for line in LIST.read_text().splitlines() if line.endswith(("PATH", "FILE"))]


@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize(("command", "option"), [(command, text.split()[0]) for command, _, text in PATHS])
def test_no_command_takes_an_empty_path_for_the_current_folder(
    command: str, option: str, blank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, arguments = COMMANDS[command]
    monkeypatch.setattr(sys, "argv", [command.split()[0], *arguments, *WITH.get(command, ()), option, blank])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {option} is '' but must be a path: check that the variable")


@pytest.mark.parametrize(
    "command",
    ["mvssl-convert", "mvssl-features", "mvssl-train report", "mvssl-train runs", "mvssl-eval compare"],
)
def test_nor_an_empty_position(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, arguments = COMMANDS[command]
    positions = ["", *WITH[command][1:]]
    monkeypatch.setattr(sys, "argv", [command.split()[0], *arguments, *positions])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 1
    assert "is '' but must be a path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "use",
    [
        lambda: open_source(""),
        lambda: split_paths(" "),
        lambda: mvssl.train(mvssl.recipes.demo(), data="", out="run"),
        lambda: mvssl.train(mvssl.recipes.demo(), data="data", out=""),
        lambda: RunOptions(val=""),  # type: ignore[arg-type]
        lambda: EvalOptions(data=""),  # type: ignore[arg-type]
        lambda: BackboneSource(run=""),  # type: ignore[arg-type]
    ],
)
def test_nor_does_a_function(use: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="is '' but must be a path"):
        use()
