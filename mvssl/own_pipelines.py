"""Importing this fails with one sentence if `import pipelines` would find, or has found, another project's package."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

_OURS = Path(__file__).resolve().parent.with_name("pipelines")


def other_pipelines() -> str | None:
    """What `import pipelines` finds instead of the package that is installed with mvssl; None if it finds that one."""
    if (loaded := sys.modules.get("pipelines")) is not None:
        places = [*getattr(loaded, "__path__", ())] or [getattr(loaded, "__file__", None) or "a module without a file"]
    elif (spec := importlib.util.find_spec("pipelines")) is not None:
        places = [*(spec.submodule_search_locations or ())] or [spec.origin or "a module without a file"]
    else:
        return "missing"
    return None if any(Path(place).resolve() == _OURS for place in places[:1]) else os.path.abspath(places[0])


if (found := other_pipelines()) is not None:
    _MESSAGE = (
        f"the package pipelines is {found} but must be {_OURS}, which mvssl brings along: rename yours, or keep it off "
        "the path (PYTHONPATH and the folder of the script that is run)."
    )
    if any(Path(name).name.startswith("mvssl-") for name in sys.argv[:1]):  # a command: no traceback
        sys.exit(f"error: {_MESSAGE}")
    raise ImportError(_MESSAGE, name="pipelines")
