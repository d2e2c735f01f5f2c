"""Images to views: storage, decoding, random decisions and the view engine. Knows nothing of learning."""

from __future__ import annotations

from pipelines.batch import DecodedBatch, ViewBatch
from pipelines.errors import InputError
from pipelines.views.draw import draw
from pipelines.views.engine import ViewEngine
from pipelines.views.spec import ViewSpec, paper_views

__all__ = ["DecodedBatch", "InputError", "ViewBatch", "ViewEngine", "ViewSpec", "draw", "paper_views"]
