"""Reading files of weights without running what they hold."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pipelines.errors import InputError

# Plain values that training scripts keep beside their weights (DINO its arguments, many a numpy number); building
# them runs no code of the file.
_SCALAR: Any = type(np.float64(0)).__reduce__(np.float64(0))[0]  # numpy's own builder of numbers, under two names
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


def read_weights(path: Path) -> Mapping[str, Any]:
    """What a file of weights holds: names and tensors, on the CPU, or mappings of such.

    Args:
        path: .safetensors, or what torch.save wrote (any other ending). Metadata of a .safetensors file is left out.

    Raises:
        InputError: it is missing, damaged, no file of weights, or holds objects other than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(
            f"weights is {str(path)!r} but there is no file of that name: give a .safetensors file or a checkpoint "
            "written by torch.save."
        )
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} {_refusal(str(error))}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} cannot be read as a file of weights ({reason}): copy or download it again; it must be a "
            ".safetensors file or written by torch.save."
        ) from error
    if not isinstance(held, Mapping):
        raise InputError(
            f"{path} holds a {type(held).__name__} but must hold a mapping of names to tensors: save the network's "
            "state_dict()."
        )
    return held


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; {} of any other file, or if it has none."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError, json.JSONDecodeError):
        return {}  # reading its tensors says why


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as a .safetensors file ({error}): copy or download it again."
        ) from error


def _refusal(said: str) -> str:
    """Why torch refused a file, in a sentence: what it holds besides tensors, or that it is none of torch's."""
    marker = "GLOBAL "
    if marker in said:
        name = said.split(marker, 1)[1].split(" ", 1)[0]
        return (
            f"holds {name}, which is code and is not run here: load it where you trust it and save only the network's "
            "state_dict()."
        )
    return (
        "cannot be read as a file of weights (it holds no tensors that torch can load safely): give a .safetensors "
        "file or a state_dict() written by torch.save."
    )
