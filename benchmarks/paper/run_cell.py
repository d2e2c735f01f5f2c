"""One cell: train it, measure it on images it has not seen, and compare its gradients at marks of the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.paper.cells import Cell, Point, Setting, make_recipe
from benchmarks.paper.splits import Splits
from mvssl.config.options import RunOptions, autocast_dtype, resolve_device
from mvssl.config.recipe import Recipe
from mvssl.evaluate.features import extract_features
from mvssl.evaluate.knn import knn_predictions
from mvssl.evaluate.linear import FastLinear, fit_best
from mvssl.evaluate.linear_fit import stratified
from mvssl.evaluate.session import Session
from mvssl.models.encoder import build_networks
from mvssl.monitor.view_diagnostics import gradient_cosines, view_diagnostics
from mvssl.runs import checkpoint
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_jsonl
from mvssl.training.run import run
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.storage import open_source

K, TEMPERATURE = 20, 0.07
POINTS = 100  # of a curve, at most
BATCHES = 4  # whose gradients are averaged at a mark


def run_cell(
    cell: Cell, point: Point, setting: Setting, splits: Splits, folder: Path, *, device: str, threads: int
) -> dict[str, Any]:
    """Train a cell, or go on where it was stopped; its measurements as plain JSON values.

    Args:
        cell: what is run.
        point: its learning rate, weight decay and target decay.
        setting: its size.
        splits: the images.
        folder: of the run; is left there.
        device: as RunOptions takes it.
        threads: of torch and of decoding, on the CPU.
    """
    torch.set_num_threads(threads)
    began = time.perf_counter()
    recipe = make_recipe(cell, point, setting)
    on = resolve_device(device)
    result = run(
        recipe,
        RunOptions(
            data=splits.train,
            out=folder,
            device=device,
            threads=threads,
            cache="device" if on.type == "cuda" else "host",
            log=("none",),
            log_every=20,
            save_every_epochs=max(1, recipe.epochs // setting.marks),
            keep_checkpoints=1 if cell.point is not None else 2 * setting.marks,
            resume=(folder / "config.json").exists(),
        ),
        console=Console(quiet=True),
    )
    trained = time.perf_counter() - began
    online, _ = _networks(recipe, checkpoint.load(RunFolder(folder).last).state["step"], on)
    measured = measure(online.backbone, recipe, setting, splits, device=on, test=cell.point is None)
    row: dict[str, Any] = {
        "steps": result.steps,
        "images_per_second": _short(result.images_per_second),
        "seconds_training": _short(trained),
        **measured,
    }
    if cell.point is None:
        row["curves"] = curves(folder)
        row["signals"] = signals(recipe, folder, splits, device=on, threads=threads)
    row["seconds"] = _short(time.perf_counter() - began)
    return row


def measure(
    backbone: nn.Module, recipe: Recipe, setting: Setting, splits: Splits, *, device: torch.device, test: bool
) -> dict[str, Any]:
    """kNN accuracy on the tuning images; with `test` also kNN and linear accuracy on the test images, and which hit."""
    session = Session(device=device, autocast=autocast_dtype(recipe.precision, device))

    def features(path: Path) -> tuple[Tensor, Tensor]:
        with closing(open_source(path)) as source:
            found = extract_features(session, backbone, source, recipe.evaluation)
        return found.values, found.labels

    bank, labels = features(splits.train)

    def knn(path: Path) -> tuple[Tensor, Tensor, Tensor]:
        queries, truth = features(path)
        voted = knn_predictions(bank, labels, queries, k=(K,), temperatures=(TEMPERATURE,))[K, TEMPERATURE]
        return voted == truth, queries, truth

    right, _, _ = knn(splits.tuning)
    row: dict[str, Any] = {"tuning_knn": float(right.double().mean())}
    if test:
        right, queries, truth = knn(splits.test)
        protocol = FastLinear()
        held_out = stratified(labels.cpu(), protocol.held_out, seed=protocol.seed).to(device)
        best = fit_best(bank, labels, protocol, classes=setting.classes, held_out=held_out)
        linear = best.classifiers.ranked(queries, 0)[:, 0] == truth
        row |= {
            "knn": float(right.double().mean()),
            "linear": float(linear.double().mean()),
            "test_images": len(truth),
            "knn_hits": pack(right),
            "linear_hits": pack(linear),
        }
    return row


def pack(right: Tensor) -> str:
    """Which test images were right, a bit each, in hexadecimal digits."""
    return np.packbits(right.cpu().numpy()).tobytes().hex()


def unpack(digits: str, images: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """What `pack` packed: bool [images]."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))[:images].astype(bool)


def curves(folder: Path) -> dict[str, list[float | None]]:
    """The run's numbers over its steps, thinned: step, loss of each task, gradient norm, spread and rank."""
    rows = [row for row in read_jsonl(RunFolder(folder).metrics) if row["kind"] == "train"]
    every = -(-len(rows) // POINTS) or 1
    rows = rows[every - 1 :: every]
    names = [name for name in rows[0] if name.startswith("loss/")] if rows else []
    return {
        name: [None if row[name] is None else _short(row[name]) for row in rows]
        for name in ("step", *names, "grad_norm", "embedding_std", "effective_rank")
    }


def signals(
    recipe: Recipe, folder: Path, splits: Splits, *, device: torch.device, threads: int
) -> list[dict[str, Any]]:
    """Gradients of the views compared, and ranks, at every checkpoint of a run; on the same batches each time."""
    batches = list(_batches(recipe, splits.train, device))
    found = []
    for path in sorted(RunFolder(folder).checkpoints.glob("step-*")):
        saved = checkpoint.load(path)
        online, target = _networks(recipe, saved.state["step"], device)
        seen = view_diagnostics(recipe, online, target, batches)
        share = recipe.predictors == "shared"
        cosines = {
            "encoder": gradient_cosines(seen.encoder, recipe.views),
            "predictor": gradient_cosines(seen.predictor, recipe.views, tasks_share=share),
        }
        found.append(
            {
                "step": int(saved.meta["step"]),
                "cosine": {part: _rounded(values) for part, values in cosines.items()},
                "prediction_rank": _rounded(seen.prediction_rank),
                "embedding_rank": _short(seen.embedding_rank),
                "embedding_std": _short(seen.embedding_std),
            }
        )
    return found


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: _short(value) for name, value in values.items()}


def _batches(recipe: Recipe, train: Path, device: torch.device) -> Iterator[list[Tensor]]:
    """The first batches of an order of its own: no seed of a cell has it."""
    with closing(open_source(train)) as source:
        order = Order(num_images=len(source), batch_size=recipe.batch_size, seed=2**32)
        with closing(Loader(source, recipe.views, order, device=device)) as loader:
            for batch in islice(loader.epoch(0), BATCHES):
                yield [view.clone() for view in batch.views]


def _networks(recipe: Recipe, state: dict[str, Any], device: torch.device) -> tuple[Any, Any]:
    """The networks of a checkpoint; None for the target where there is none."""
    online, target = build_networks(recipe)
    online.load_state_dict(state["online"])
    if state["target"] is None:
        return online.to(device), None
    target.load_state_dict(state["target"])
    return online.to(device), target.to(device)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
