"""Where the networks lie in other people's checkpoints. A new layout is one entry of LAYOUTS.

Sources: the release of arXiv 2602.05845; github.com/facebookresearch/moco-v3, /moco, /simsiam and /dino.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pipelines.errors import InputError

Network = Literal["online", "target"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to lay networks out in a file.

    Attributes:
        name: whose it is, for messages.
        networks: key of the file's mapping that holds a network's tensors; "" is the file itself. The first is what
            people evaluate.
        backbone: what stands in front of the backbone's names, by network; "" for nothing.
        projector: what stands in front of the projector's names; names that lie among the backbone's are taken out.
        predictor: what stands in front of the predictors' names.
        needs: beginnings of names, one of which the file must have (after `module.`).
    """

    name: str
    networks: Mapping[Network, str]
    backbone: Mapping[Network, str]
    projector: tuple[str, ...] = ()
    predictor: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


LAYOUTS = (
    Layout(
        name="the paper's release",
        networks={"online": "online_model", "target": "target_model"},
        backbone={"online": "backbone.", "target": "backbone."},
        projector=("projector.",),
        predictor=("predictors.", "predictor."),
        needs=("backbone.",),
    ),
    Layout(
        name="MoCo v3",
        networks={"online": "state_dict", "target": "state_dict"},
        backbone={"online": "base_encoder.", "target": "momentum_encoder."},
        projector=("fc.", "head."),
        predictor=("predictor.",),
        needs=("base_encoder.", "momentum_encoder."),
    ),
    Layout(
        name="MoCo v1 or v2",
        networks={"online": "state_dict", "target": "state_dict"},
        backbone={"online": "encoder_q.", "target": "encoder_k."},
        projector=("fc.",),
        needs=("encoder_q.", "encoder_k."),
    ),
    Layout(
        name="SimSiam",
        networks={"online": "state_dict"},
        backbone={"online": "encoder."},
        projector=("fc.",),
        predictor=("predictor.",),
        needs=("encoder.",),
    ),
    Layout(
        name="DINO",
        networks={"target": "teacher", "online": "student"},
        backbone={"target": "backbone.", "online": "backbone."},
        projector=("head.",),
        needs=("backbone.",),
    ),
    *(
        Layout(
            name="a backbone",
            networks={"online": key},
            backbone={"online": prefix},
            needs=tuple(prefix + first for first in ("conv1.", "stem.", "patch_embed.", "cls_token", "conv_proj.")),
        )
        for key in ("", "state_dict", "model")
        for prefix in ("", "backbone.")
    ),
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The networks of a file.

    Attributes:
        layout: name of the layout.
        network: online or target.
        backbone: tensors under the names of timm or torchvision.
        projector: tensors of the projection head, as in the file, without what stands in front; {} if there is none.
        predictor: the same of the predictors.
        architecture: what the file says of it; None if it says nothing.
        beside: the other values of the file that are no tensors.
    """

    layout: str
    network: Network
    backbone: Tensors
    projector: Tensors = field(default_factory=dict)
    predictor: Tensors = field(default_factory=dict)
    architecture: str | None = None


def find_networks(held: Mapping[str, Any], *, network: Network | None = None, where: str) -> Found:
    """Find a network in what a file holds.

    Args:
        held: names and tensors, or mappings of such.
        network: online or target; None takes the one that people evaluate (DINO's teacher, else the online one).
        where: the file, for messages.

    Raises:
        InputError: no layout fits; what was found, what was expected, and the nearest layout are named. Or the network
            is not in the file.
    """
    for layout in LAYOUTS:
        choice = network if network is not None else next(iter(layout.networks))
        tensors = _tensors(held, layout.networks.get(choice))
        others = [_tensors(held, key) for key in layout.networks.values()]
        if not any(_fits(layout, candidate) for candidate in (tensors, *others)):
            continue
        prefix = layout.backbone.get(choice)
        mine = {} if prefix is None else _below(tensors, prefix)
        if prefix is None or not mine:
            there = [name for name in layout.networks if name != choice]
            raise InputError(
                f"network is {choice!r} but {where} ({layout.name}) has no such network: use --network {there[0]}."
                if there
                else f"network is {choice!r} but {where} ({layout.name}) holds one network only: leave --network out."
            )
        inside = {name: value for name, value in mine.items() if name.startswith(layout.projector)}
        outside = {name: value for name, value in tensors.items() if name.startswith(layout.projector)}
        heads = inside or outside
        return Found(
            layout=layout.name,
            network=choice,
            backbone={name: value for name, value in mine.items() if name not in inside},
            projector={name.split(".", 1)[1]: value for name, value in heads.items()} if layout.projector else {},
            predictor={name.split(".", 1)[1]: v for name, v in tensors.items() if name.startswith(layout.predictor)}
            if layout.predictor
            else {},
            architecture=_architecture(held),
        )
    raise InputError(_unknown(held, where))


def _tensors(held: Mapping[str, Any], key: str | None) -> Tensors:
    """The tensors at a key, without the ``module.`` of a data-parallel wrapper; {} if there is nothing."""
    part = None if key is None else held if key == "" else held.get(key)
    if not isinstance(part, Mapping):
        return {}
    tensors = {str(name): value for name, value in part.items() if isinstance(value, Tensor)}
    for wrapper in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = _below(tensors, wrapper)
    return tensors


def _below(tensors: Tensors, prefix: str) -> Tensors:
    below = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix("module."): value for name, value in below.items()}


def _fits(layout: Layout, tensors: Tensors) -> bool:
    return any(name.startswith(layout.needs) for name in tensors)


def _architecture(held: Mapping[str, Any]) -> str | None:
    """The architecture that training scripts write beside the weights: MoCo and SimSiam "arch", DINO args.arch."""
    arguments = held.get("args")
    said = held.get("arch", getattr(arguments, "arch", None))
    return said if isinstance(said, str) else None


def _unknown(held: Mapping[str, Any], where: str) -> str:
    """What was found, what was expected and which layout is nearest."""
    below = {
        f"{key}/" * bool(key) + ".".join(name.split(".")[:2])
        for key in ("", *(str(key) for key, value in held.items() if isinstance(value, Mapping)))
        for name in _tensors(held, key)
    }
    found = sorted(below) or sorted(map(str, held))
    expected = {
        layout.name: [f"{key}/" * bool(key) + begin for key in layout.networks.values() for begin in layout.needs]
        for layout in LAYOUTS
    }
    nearest = max(
        expected,
        key=lambda name: max(
            difflib.SequenceMatcher(None, one, other).ratio() for one in found or [""] for other in expected[name]
        ),
    )
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    wanted = " or ".join(dict.fromkeys(expected[nearest]))
    return (
        f"{where} holds names such as {shown or 'none at all'}, a layout that is not known: the nearest is {nearest}, "
        f"with names that begin with {wanted}. Known are "
        f"{', '.join(dict.fromkeys(layout.name for layout in LAYOUTS))}: save the backbone's state_dict() alone."
    )
