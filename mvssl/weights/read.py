"""Reads files of weights, and folders in timm's form, without running code from them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mvssl.pickles.safe_pickle import Global, Inert
from mvssl.pickles.torch_file import read_torch_file
from pipelines.files import open_regular, read_json
from pipelines.names import shortened
from pipelines.runtime import InputError, describe_os_error

_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError)
"""What safetensors and torch raise for files that are damaged or lie."""


def read_weights(path: Path) -> Mapping[str, Any]:
    """Read a .safetensors file, or one that torch.save or pickle wrote (any other ending), without running its code.

    Returns:
        Tensors on the CPU by name, or mappings of such; plain values and `Inert` objects may lie between them.

    Raises:
        InputError: the file is missing or damaged, or is no mapping with tensors.
    """
    if not path.is_file():
        raise InputError(
            f"weights is {str(path)!r} but there is no file of that name: give a .safetensors file or a checkpoint "
            "written by torch.save."
        )
    try:
        if _is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        content = read_torch_file(path)
    except (*_UNREADABLE, pickle.UnpicklingError, SafetensorError) as error:
        reason = shortened((str(error) or type(error).__name__).splitlines()[0], 500)
        raise InputError(
            f"{path} cannot be read as a file of weights ({reason}): copy or download it again; it must be a "
            ".safetensors file or written by torch.save."
        ) from error
    values = content.values() if isinstance(content, Mapping) else [content]
    code = list(dict.fromkeys(value.name for value in values if isinstance(value, (Global, Inert))))
    if code and not any(isinstance(value, (Tensor, Mapping)) for value in values):
        raise InputError(
            f"{path} holds no tensors but {', '.join(code[:3])}, which is code and is not run here: load it where you "
            "trust it and save only the network's state_dict()."
        )
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path} holds a {type(content).__name__} but must hold a mapping of names to tensors: save the network's "
            "state_dict()."
        )
    return content


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as the format does, with the length of its header and the header, whatever its name is."""
    with open_regular(path) as file:
        head = file.read(9)
    torchs = head.startswith(b"PK") or head[:1] == b"\x80"
    return head[8:] == b"{" or (path.suffix.lower() == ".safetensors" and not torchs)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; empty for any other file, or if it has none."""
    try:
        if not _is_safetensors(path):
            return {}
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (*_UNREADABLE, SafetensorError):
        return {}  # read_weights says why


def is_timm_folder(path: Path) -> bool:
    """Whether a folder holds a model as timm and its hub loader take it."""
    return any((path / name).is_file() for name in _FILES) and (path / "config.json").is_file()


_FILES = ("model.safetensors", "pytorch_model.bin")
_MOST_BLOCKS, _LARGEST_SIZE = 1000, 1 << 16  # of a network that a config.json asks for


def read_folder(path: Path, *, field: str = "weights") -> tuple[Path, dict[str, Any]]:
    """Path of the weights, and config.json, of a folder as timm and its hub loader take it.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        config = read_json(path / "config.json")
        if not isinstance(config["architecture"], str):
            raise ValueError("architecture is no name")
        if not all(isinstance(config.get(key, {}), dict) for key in ("pretrained_cfg", "model_args")):
            raise ValueError("pretrained_cfg or model_args is no table")
        for name, value in config.get("model_args", {}).items():
            most = _MOST_BLOCKS if name in ("depth", "depths", "layers") else _LARGEST_SIZE
            if any(isinstance(one, int | float) and abs(one) > most for one in np.ravel(np.array(value, object))):
                raise ValueError(f"model_args.{name} is {value} but must be at most {most:,}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"{field} is {str(path)!r}, a folder whose config.json cannot be read ({reason}): give a file of weights, "
            "a folder with timm's config.json and model.safetensors, or a run folder with --run.",
            field=field,
        ) from error
    for name in _FILES:
        if (path / name).is_file():
            return path / name, config
    raise InputError(
        f"{field} is {str(path)!r}, a folder with config.json but without model.safetensors: copy it again.",
        field=field,
    )


def _is_number(tensor: Tensor) -> bool:
    """Whether all values are finite real numbers."""
    return not tensor.is_complex() and (not tensor.is_floating_point() or bool(tensor.float().isfinite().all()))


def load_tensors(
    backbone: nn.Module, tensors: Mapping[str, Tensor], name: str, where: str, *, option: str = "--arch"
) -> None:
    """Load tensors under timm's names, without the classifier; BatchNorm's batch counters may be missing.

    Args:
        backbone: the model to load into.
        tensors: its parameters and buffers.
        name: timm's name of the architecture.
        where: origin of the tensors, for messages.
        option: what names another architecture, for messages.

    Raises:
        InputError: names or shapes do not fit; the message gives some.
    """
    wanted = backbone.state_dict()
    classifier = timm.get_pretrained_cfg_value(name, "classifier") if timm.is_model(name.split(".")[0]) else None
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    classifiers = tuple(f"{head}." for head in (*heads, "fc", "head", "heads"))
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    given = counters | {k: v for k, v in tensors.items() if k in wanted or not k.startswith(classifiers)}
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    shapes = [
        f"{key} {list(value.shape)} instead of {list(wanted[key].shape)}"
        for key, value in given.items()
        if key in wanted and value.shape != wanted[key].shape
    ]
    for problem, keys in (("lacks", missing), ("has the unexpected", unexpected), ("has", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise InputError(
                f"{where} does not fit {name}: it {problem} {', '.join(keys[:3])}{more}. Name the architecture that "
                f"the weights belong to ({option}), or export them again."
            )
    wrong = next((key for key, value in given.items() if not _is_number(value)), None)
    if wrong is not None:
        raise InputError(
            f"{where} has complex, infinite or undefined numbers in {wrong} but must have finite real ones: use "
            "weights from before its training diverged, or export them again."
        )
    try:
        backbone.load_state_dict(given)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{where} does not fit {name}: {str(error).splitlines()[-1].strip()}: export the weights again."
        ) from error
