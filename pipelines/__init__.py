"""Images to views: storage, decoding, augmentation parameters and the view engine. Knows nothing of learning."""

from __future__ import annotations

from pipelines.batch import DecodedBatch, ViewBatch
from pipelines.runtime import InputError
from pipelines.views.engine import ViewEngine
from pipelines.views.presets import (
    asymmetric,
    byol_views,
    crop_only_views,
    cutout_only_views,
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
    "ViewBatch",
    "ViewEngine",
    "ViewSpec",
    "asymmetric",
    "byol_views",
    "crop_only_views",
    "cutout_only_views",
    "draw",
    "mocov3_views",
    "no_crop_views",
    "paper_views",
    "simsiam_views",
]
