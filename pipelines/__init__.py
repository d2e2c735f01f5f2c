"""Images to views: storage, decoding, augmentation parameters and the view engine. Knows nothing of learning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.batch import DecodedBatch, ViewBatch
    from pipelines.loader import Loader
    from pipelines.order import Order, Ranks
    from pipelines.runtime import InputError
    from pipelines.storage.given import source_of
    from pipelines.views.engine import ViewEngine
    from pipelines.views.presets import (
        adapt_views,
        aerial_views,
        asymmetric,
        byol_views,
        crop_only_views,
        cutout_only_views,
        microscopy_views,
        mocov3_views,
        no_crop_views,
        paper_views,
        simsiam_views,
    )
    from pipelines.views.sampling import draw
    from pipelines.views.spec import ViewSpec

__all__ = [
    "DecodedBatch",
    "InputError",
    "Loader",
    "Order",
    "Ranks",
    "ViewBatch",
    "ViewEngine",
    "ViewSpec",
    "adapt_views",
    "aerial_views",
    "asymmetric",
    "byol_views",
    "crop_only_views",
    "cutout_only_views",
    "draw",
    "microscopy_views",
    "mocov3_views",
    "no_crop_views",
    "paper_views",
    "simsiam_views",
    "source_of",
]

_MODULES = {
    "DecodedBatch": "pipelines.batch",
    "InputError": "pipelines.runtime",
    "Loader": "pipelines.loader",
    "Order": "pipelines.order",
    "Ranks": "pipelines.order",
    "ViewBatch": "pipelines.batch",
    "ViewEngine": "pipelines.views.engine",
    "ViewSpec": "pipelines.views.spec",
    "draw": "pipelines.views.sampling",
    "source_of": "pipelines.storage.given",
}
"""Where the public names come from; all others are presets."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and help, lists and conversion need none."""
    if name not in __all__:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(_MODULES.get(name, "pipelines.views.presets")), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
