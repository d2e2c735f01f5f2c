"""views.png: what the recipe's views look like on the first images of the run."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mvssl.experiment import Experiment
from pipelines.batch import DecodedBatch
from pipelines.decode import make_decoder
from pipelines.storage.source import Source
from pipelines.views.draw import draw
from pipelines.views.engine import ViewEngine
from pipelines.views.sheet import view_sheet


def write_view_sheet(experiment: Experiment, out: Path, *, num_images: int = 4) -> None:
    """Draw the first images of epoch 0 and all their views, just as the run will see them."""
    specs = experiment.recipe.views
    index = torch.from_numpy(experiment.order.permutation(0)[:num_images])  # [N]
    decoder = make_decoder("pillow", device="cpu", batch_size=len(index), threads=1)
    try:
        decoded = decoder([_read(experiment.source, i) for i in index.tolist()])
    finally:
        decoder.close()
    good = torch.tensor([n not in decoded.failures for n in range(len(index))])  # [N]
    if not good.any():
        return  # the loader names and replaces undecodable images; there is nothing to draw here
    batch = DecodedBatch.packed(decoded.pixels, sizes=decoded.sizes, index=index[good])
    params = draw(specs, batch.sizes, seed=experiment.recipe.seed, epoch=0, index=batch.index)
    views = ViewEngine(specs, device="cpu")(batch, params)  # V tensors [N, 3, S, S]
    aside = out.with_name(f".{out.name}")
    view_sheet(batch, specs, params, views).save(aside, format="png")
    os.replace(aside, out)


def _read(source: Source, index: int) -> NDArray[np.uint8]:
    """The encoded image; nothing where it cannot be read, which the loader will say."""
    try:
        return source.read(index)
    except OSError:
        return np.empty(0, np.uint8)
