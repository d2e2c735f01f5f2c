"""The pictures in a run folder: losses.png and views.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.text import Text
from numpy.typing import NDArray

from mvssl.config.recipe import Recipe
from mvssl.runs.jsonl import read_metrics
from pipelines.batch import DecodedBatch
from pipelines.decode import make_decoder
from pipelines.files import whole_file
from pipelines.names import NAME, visible
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source
from pipelines.views.engine import ViewEngine
from pipelines.views.sampling import draw
from pipelines.views.sheet import view_sheet

_COLUMNS = 5  # of a legend


def plot_losses(metrics: Path, out: Path) -> None:
    """Plot the loss of each task and any kNN accuracy over the steps in metrics.jsonl, as a PNG."""
    rows = list(read_metrics(metrics))
    train = [row for row in rows if row["kind"] == "train"]
    knn = [row for row in rows if row["kind"] == "knn"]
    figure = Figure(figsize=(8.0, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [row["step"] for row in train]
    lines, names = [], []
    for key in [key for key in (train[0] if train else {}) if key.startswith("loss/")]:
        lines += axes.plot(steps, [math.nan if row.get(key) is None else row[key] for row in train], linewidth=1.4)
        names.append(key.removeprefix("loss/"))
    axes.set_xlabel("step")
    axes.set_ylabel("loss per task")
    axes.grid(alpha=0.25)
    if knn:
        right = axes.twinx()
        lines += right.plot([row["step"] for row in knn], [100 * row["top1"] for row in knn], "k.--")
        names.append("kNN top-1")
        right.set_ylabel("kNN top-1 (%)")
        right.set_ylim(0, 100)
    if lines:
        legend = figure.legend(
            lines, plain_labels(names), loc="outside upper center", ncols=min(len(lines), _COLUMNS), frameon=False
        )
        show_plainly(legend.get_texts(), names)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png")


def plain_labels(names: Sequence[str]) -> list[str]:
    """Labels that stand for names until `show_plainly`: matplotlib leaves out those that begin with an underscore."""
    return [str(number) for number in range(len(names))]


def show_plainly(texts: Sequence[Text], names: Sequence[str]) -> None:
    """Let texts of a figure show names `visible`, at most `NAME` characters, with ``$`` as it is.

    Characters that the font lacks become escapes.
    """
    for text, name in zip(texts, names, strict=True):
        font = get_font(findfont(text.get_fontproperties()))
        shown = visible(name, NAME)
        text.set_parse_math(False)
        text.set_text("".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in shown))


def write_view_sheet(recipe: Recipe, source: Source, images: NDArray[np.int64], out: Path) -> None:
    """Draw some images (indices [N]) and their views in epoch 0, the same as in training."""
    specs = recipe.views
    index = torch.from_numpy(images)  # [N]
    facts = facts_of(source)
    with closing(
        make_decoder(
            "pillow",
            device="cpu",
            batch_size=len(index),
            threads=1,
            value_range=facts.value_range,
            limits=facts.limits,
        )
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
