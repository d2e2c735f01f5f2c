"""Results of evaluations as JSON: of what each is, never overwritten by another, and found again."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvssl.runs.environment import environment
from mvssl.runs.folder import write_json
from pipelines.runtime import InputError


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """Where one evaluation keeps its result.

    Attributes:
        folder: of the results.
        evaluation: what is measured, such as knn or finetune-10pct.
        network: of what, such as online or untrained.
        identity: what was measured and how: JSON values. The same identity gives the same result.
        overwrite: whether the result of another identity may be replaced, and one of the same be measured anew.
    """

    folder: Path
    evaluation: str
    network: str
    identity: Mapping[str, Any]
    overwrite: bool = False

    @property
    def path(self) -> Path:
        """FOLDER/EVALUATION-NETWORK.json."""
        return self.folder / f"{self.evaluation}-{self.network}.json"

    def earlier(self) -> dict[str, Any] | None:
        """The result of the same evaluation, if it is there already.

        Raises:
            InputError: there is that of another one, or something else, and `overwrite` is not set.
        """
        if self.overwrite or not self.path.exists():
            return None
        held = read_result(self.path)
        ours = json.loads(json.dumps(self.identity))
        if held["identity"] == ours:
            results: dict[str, Any] = held["results"]
            return results
        differs = [name for name in ours if held["identity"].get(name) != ours[name]]
        raise InputError(
            f"{self.path} holds the result of another evaluation ({', '.join(differs) or 'its fields'} differ): add "
            "--overwrite to replace it, or choose another folder with --out."
        )

    def write(self, results: Mapping[str, Any]) -> None:
        """Keep a result. Raises OSError if it cannot be written; what was there is kept then."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = {
            "evaluation": self.evaluation,
            "network": self.network,
            "identity": dict(self.identity),
            "results": dict(results),
            "environment": environment(),
        }
        write_json(self.path, held)


def read_result(path: Path) -> dict[str, Any]:
    """A result file's contents: evaluation, network, identity, results and environment.

    Raises:
        InputError: it is none.
    """
    try:
        held = json.loads(path.read_text())
        if {"evaluation", "network", "identity", "results"} <= held.keys():
            return dict(held)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as a result of mvssl-eval ({error}): delete it, or choose another --out."
        ) from error
    raise InputError(f"{path} is no result of mvssl-eval: move it away, or choose another folder with --out.")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other evaluations out of a folder meanwhile.

    Raises:
        InputError: one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"Another evaluation is writing to {folder}: wait for it, or choose another folder with --out."
            ) from error
        yield
