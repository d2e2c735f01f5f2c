"""Weights & Biases, where `--log wandb` asks for it; offline without an account."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvssl.runs.folder import RunFolder
from mvssl.runs.options import RunOptions

_log = logging.getLogger("mvssl")


class WandbWriter:
    """Writes to a run of Weights & Biases: online with an account (WANDB_API_KEY or wandb login), else into RUN/wandb.

    A resumed run goes on in the same one. What goes wrong there never ends the training.
    """

    def __init__(self, folder: RunFolder, options: RunOptions, *, first_step: int) -> None:
        wandb = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_account() else "offline")
        # The same run has the same name there wherever it is resumed.
        identity = hashlib.sha256(folder.environment.read_bytes()).hexdigest()[:16]
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "mvssl"),
                name=options.run_name or folder.path.name,
                id=identity,
                resume="allow",
                notes=options.notes,
                tags=list(options.tags) or None,
                config=json.loads(folder.config.read_text())["recipe"],
                dir=str(folder.path),
                mode=mode,
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # whatever fails there, the run is worth more
            _log.warning("Weights & Biases cannot be used (%s): this run is not logged there.", _first_line(error))
            return
        where = self._run.url if mode == "online" else f"offline; wandb sync {Path(self._run.dir).parent} uploads it"
        _log.info("Weights & Biases: %s", where)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        if self._run is None:
            return
        try:
            self._run.log(dict(scalars), step=step)
        except Exception as error:
            _log.warning("Weights & Biases takes no more numbers (%s).", _first_line(error))
            self._run = None

    def close(self) -> None:
        """Wait until what was written is there."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                _log.warning("Weights & Biases did not end well (%s).", _first_line(error))


def _has_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "api.wandb.ai" in netrc.read_text()
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
