"""What compiling a step without a GPU predicts of it, to stand beside what a GPU does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
FIELDS = ("batch_size", "megabytes_per_image", "launches", "predicted_milliseconds")


def predicted(recipe: str, *, device: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Bytes, launches and time of the compiled step, as bench_compile left them for this kind of GPU.

    Args:
        recipe: its name.
        device: where steps are measured; there is no prediction for a CPU.
        folder: of the results.

    Returns:
        Those of FIELDS that are known; None where nothing is.
    """
    if device != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability()
    path = folder / f"compile_{recipe}_sm{major}{minor}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return chosen(found)


def chosen(found: Mapping[str, Any]) -> dict[str, Any]:
    """What of a compilation's result is a prediction."""
    return {name: found[name] for name in FIELDS if found.get(name) is not None}
