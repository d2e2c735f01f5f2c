"""Result files of evaluations: JSON with the identity of what was measured, which no other result overwrites."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvssl.runs.checked_json import read_checked, write_checked
from mvssl.runs.environment import environment
from pipelines.files import locked
from pipelines.runtime import InputError, shown


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """The file of one evaluation's result.

    Attributes:
        folder: of the results.
        evaluation: what is measured, such as knn or finetune-10pct.
        network: the network it is measured on, such as online or untrained.
        identity: JSON values on which the result depends; the same identity gives the same result.
        overwrite: whether to replace a result of another identity, and to measure again one of the same.
        conditions: crop, network and so on, for people (`describe`).
    """

    folder: Path
    evaluation: str
    network: str
    identity: Mapping[str, Any]
    overwrite: bool = False
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """FOLDER/EVALUATION-NETWORK.json."""
        return self.folder / f"{self.evaluation}-{self.network}.json"

    def earlier(self) -> dict[str, Any] | None:
        """The earlier result of the same identity; None if there is none, or with `overwrite`.

        Raises:
            InputError: the file holds a result of another identity, or something else, and `overwrite` is not set.
        """
        if self.overwrite or not self.path.exists():
            return None
        content = read_result(self.path)
        identity = json.loads(json.dumps(self.identity))
        if content["identity"] == identity:
            results: dict[str, Any] = content["results"]
            return results
        differ = [key for key in identity if content["identity"].get(key) != identity[key]]
        raise InputError(
            f"{self.path} holds the result of another evaluation ({', '.join(differ) or 'its fields'} differ): add "
            "--overwrite to replace it, or choose another folder with --out."
        )

    def write(self, results: Mapping[str, Any]) -> None:
        """Write a result.

        Raises:
            OSError: the file cannot be written; an earlier one is untouched.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "evaluation": self.evaluation,
            "network": self.network,
            "identity": dict(self.identity),
            "conditions": dict(self.conditions),
            "results": dict(results),
            "environment": environment(),
        }
        write_checked(self.path, content)


def read_result(path: Path) -> dict[str, Any]:
    """A result file's evaluation, network, identity, results and environment.

    Raises:
        InputError: it cannot be read, its checksum is wrong, or it holds something else.
    """
    try:
        content = read_checked(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a result of mvssl-eval ({error}): delete it, or choose another --out."
        ) from error
    problem = _problem(content)
    if problem:
        raise InputError(
            f"{path} is no result of mvssl-eval ({problem}): move it away, or choose another folder with --out."
        )
    return content


_ENTRIES = {"evaluation": str, "network": str, "identity": dict, "results": dict}
_NUMBERS = ("images", "neighbours", "train_images", "lr", "weight_decay", "temperature", "k")


def _problem(content: Mapping[str, Any]) -> str:
    """What of a result file's content is missing or of another kind; "" if it is a result."""
    for name, kind in _ENTRIES.items():
        if not isinstance(content.get(name), kind):
            return f"{name} is {shown(content.get(name))}"
    conditions = content.get("conditions", {})
    if not isinstance(conditions, dict) or any(isinstance(value, (dict, list)) for value in conditions.values()):
        return "conditions are no table"
    results = content["results"]
    settings = results.get("settings", [])
    for row in (results.get("best", results), *(settings if isinstance(settings, list) else [settings])):
        if not isinstance(row, dict):
            return f"an accuracy is {shown(row)}"
        interval = row.get("top1_interval_95")
        accuracies = [row.get("top1"), *(interval if isinstance(interval, list) and len(interval) == 2 else [None])]
        accuracies += [] if row.get("top5") is None else [row["top5"]]
        if not all(_is_number(value) and 0 <= value <= 1 for value in accuracies):
            return f"an accuracy is {shown(accuracies)}"
        wrong = [name for name in _NUMBERS for of in (results, row) if name in of and not _is_number(of[name])]
        if wrong:
            return f"{wrong[0]} is no number"
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def conditions_of(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The conditions of a result (`read_result`); of a file of an earlier version what its identity says."""
    identity = result["identity"]
    known: Mapping[str, Any] = result.get("conditions") or {
        "interpolation": "bicubic",
        "network": result["network"],
        **{name: identity[name] for name in ("resize", "crop") if name in identity},
    }
    return known


def describe(known: Mapping[str, Any]) -> str:
    """Conditions in words: crop, network and start of the linear layer."""
    words = []
    if "resize" in known:
        words.append(f"resize {known['resize']} ({known.get('interpolation')}), crop {known.get('crop')}")
    network = known.get("network")
    words.append("the file's only network" if network == "only" else f"{network} network")
    if "head_start" in known:
        words.append(f"linear layer from {known['head_start']}")
    return ", ".join(words)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create a folder and keep other evaluations out of it.

    Raises:
        InputError: another evaluation is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(
        folder / ".lock",
        f"Another evaluation is writing to {folder}: wait for it, or choose another folder with --out.",
    ):
        yield
