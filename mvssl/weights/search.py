"""Finds the backbones in a checkpoint of any layout by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from mvssl.pickles.safe_pickle import Inert

Tensors = dict[str, Tensor]

# Names that a backbone has beside each other, the first one behind a prefix: ResNets, vision transformers of timm and
# of torchvision. Of other architectures the names must be given.
_KINDS = (
    ("layer1.0.conv1.weight", "conv1.weight"),
    ("patch_embed.proj.weight", "cls_token"),
    ("conv_proj.weight", "class_token"),
)
_AVERAGED = frozenset(("ema", "momentum", "teacher", "target", "averaged", "avg", "swa", "slow", "shadow"))
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MOST_LEVELS = 6  # of tables in tables
_MOST_TABLES = 10_000
_MOST_PREFIXES = 100


def unwrapped(name: str) -> str:
    """A tensor's name without what DistributedDataParallel (in front) and other wrappers (anywhere) add to it."""
    name = _WRAPPERS.sub("", name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def tensors_of(section: Any) -> Tensors:
    """The tensors of a table by their names without wrappers; empty for anything else."""
    if not isinstance(section, Mapping):
        return {}
    tensors = {unwrapped(str(name)): value for name, value in section.items() if isinstance(value, Tensor)}
    tensors.pop("n_averaged", None)  # beside the network in torch.optim.swa_utils.AveragedModel
    return tensors


def backbones(content: Mapping[str, Any], names: Callable[[], Collection[str]] | None) -> dict[str, Tensors]:
    """Tensors of each backbone by its place in a checkpoint, such as ``state_dict/model.``.

    Args:
        content: tensors and tables of them, nested in any way.
        names: the names of the architecture's tensors, if it is known; else ResNets and vision transformers are found.
    """
    wanted = None if names is None else [name for name in names() if not name.endswith("num_batches_tracked")]
    found: dict[str, Tensors] = {}
    for place, table in _tables(content):
        tensors = tensors_of(table)
        for prefix in _prefixes(tensors, wanted):
            found[place + prefix] = {
                unwrapped(name.removeprefix(prefix)): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
    return found


def is_averaged(place: str) -> bool:
    """Whether a place is called as that of an EMA network is: ``state_dict_ema/``, ``teacher/backbone.``."""
    return not _AVERAGED.isdisjoint(re.split(r"[^a-z]+", place.lower()))


def unread(content: Mapping[str, Any]) -> str | None:
    """The first tensor that lies among others and is of a form that is not read (sparse, quantised), in words."""
    for place, table in _tables(content):
        if any(isinstance(value, Tensor) for value in table.values()):
            for name, value in table.items():
                if isinstance(value, Inert) and value.name.startswith(("torch._utils._rebuild", "torch.Q")):
                    return f"{place}{name} as a tensor that is not dense ({value.name.rpartition('.')[2]})"
    return None


def _tables(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Each table in a checkpoint with its place, the outer ones first."""
    waiting: list[tuple[str, Mapping[Any, Any], int]] = [("", content, 0)]
    seen = {id(content)}
    for place, table, level in waiting:
        yield place, table
        for key, value in table.items() if level < _MOST_LEVELS else ():
            if isinstance(value, Mapping) and id(value) not in seen and len(waiting) < _MOST_TABLES:
                seen.add(id(value))
                waiting.append((f"{place}{str(key)[:100]}/", value, level + 1))


def _prefixes(tensors: Tensors, wanted: list[str] | None) -> list[str]:
    """The prefixes behind which a backbone's names are."""
    kinds = _KINDS if wanted is None else (wanted,) if wanted else ()
    for first, *others in kinds:
        ends = [name for name in tensors if name == first or name.endswith(f".{first}")][:_MOST_PREFIXES]
        prefixes = [name.removesuffix(first) for name in ends]
        found = [prefix for prefix in prefixes if all(prefix + name in tensors for name in others)]
        if found:
            return found
    return []
