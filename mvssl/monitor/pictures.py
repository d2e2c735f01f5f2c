"""The pictures in a run folder: losses.png and views.png."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mvssl.config.recipe import Recipe
from mvssl.runs.jsonl import read_jsonl
from pipelines.batch import DecodedBatch
from pipelines.decode import make_decoder
from pipelines.files import whole_file
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source
from pipelines.views.engine import ViewEngine
from pipelines.views.sampling import draw
from pipelines.views.sheet import view_sheet


def plot_losses(metrics: Path, out: Path) -> None:
    """Plot the loss of each task and any kNN accuracy over the steps in metrics.jsonl, as a PNG."""
    rows = list(read_jsonl(metrics))
    train = [row for row in rows if row["kind"] == "train"]
    knn = [row for row in rows if row["kind"] == "knn"]
    figure = Figure(figsize=(8.0, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [row["step"] for row in train]
    for key in [key for key in (train[0] if train else {}) if key.startswith("loss/")]:
        axes.plot(steps, [row[key] for row in train], label=key.removeprefix("loss/"), linewidth=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per task")
    axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    if knn:
        right = axes.twinx()
        right.plot([row["step"] for row in knn], [100 * row["top1"] for row in knn], "k.--", label="kNN top-1")
        right.set_ylabel("kNN top-1 (%)")
        right.set_ylim(0, 100)
        more_handles, more_labels = right.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), frameon=False)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png")


def write_view_sheet(recipe: Recipe, source: Source, images: NDArray[np.int64], out: Path) -> None:
    """Draw some images (indices [N]) and their views in epoch 0, the same as in training."""
    specs = recipe.views
    index = torch.from_numpy(images)  # [N]
    value_range = facts_of(source).value_range
    with closing(
        make_decoder("pillow", device="cpu", batch_size=len(index), threads=1, value_range=value_range)
    ) as decoder:
        decoded = decoder([_read(source, i) for i in index.tolist()])
    good = torch.tensor([n not in decoded.failures for n in range(len(index))])  # [N]
    if not good.any():
        return  # the loader reports and replaces undecodable images
    batch = DecodedBatch.packed(decoded.pixels, sizes=decoded.sizes, index=index[good])
    params = draw(specs, batch.sizes, seed=recipe.seed, epoch=0, index=batch.index)
    views = ViewEngine(specs, device="cpu")(batch, params)  # V tensors [N, 3, S, S]
    with whole_file(out) as temporary:
        view_sheet(batch, specs, params, views).save(temporary, format="png")


def _read(source: Source, index: int) -> NDArray[np.uint8]:
    """The encoded image; empty if it cannot be read, which the loader will report."""
    try:
        return source.read(index)
    except OSError:
        return np.empty(0, np.uint8)
