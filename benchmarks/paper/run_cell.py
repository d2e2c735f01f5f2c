"""Runs one cell: trains it, measures it on unseen images, and compares its gradients at several checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.paper.cells import Cell, Point, Setting, make_recipe
from mvssl.config.device import autocast_dtype, resolve_device
from mvssl.config.options import RunOptions
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
from pipelines.runtime import InputError
from pipelines.storage import open_source

K, TEMPERATURE = 20, 0.07
POINTS = 100  # of a curve at most
BATCHES = 4  # over which gradients are averaged at a checkpoint


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Lists of labelled images, disjoint.

    Attributes:
        train: training images, also of kNN and the linear classifier.
        tuning: images that judge tuning.
        test: images that results are measured on: val/, and the rest of train/.
    """

    train: Path
    tuning: Path
    test: Path


def write_splits(data: Path, out: Path, setting: Setting) -> Splits:
    """Write the lists of a setting into `out`.

    Raises:
        InputError: the data has not the folders, or too few classes or images.
    """
    train = data / "train"
    if not train.is_dir() or not (data / "val").is_dir():
        raise InputError(
            f"data is {str(data)!r} but must be a folder with train/ and val/, one folder a class in each: give the "
            "folder of tiny-imagenet-50."
        )
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())[: setting.classes]
    if len(classes) < setting.classes:
        raise InputError(f"{train} has {len(classes)} classes but the setting needs {setting.classes}: give more data.")
    lines: dict[str, list[str]] = {"train": [], "tuning": [], "test": []}
    needed = setting.train_images + setting.tuning_images
    for name in classes:
        images = sorted((train / name).iterdir())
        if len(images) < needed:
            raise InputError(f"{train / name} has {len(images)} images but the setting needs {needed}.")
        parts = {
            "train": images[: setting.train_images],
            "tuning": images[setting.train_images : needed],
            "test": [*images[needed:], *sorted((data / "val" / name).iterdir())],
        }
        for part, members in parts.items():
            lines[part] += [f"{image.resolve()}\t{name}" for image in members]
    out.mkdir(parents=True, exist_ok=True)
    for part, rows in lines.items():
        path, text = out / f"{part}.txt", "\n".join(rows) + "\n"
        if not path.exists() or path.read_text() != text:  # rewriting it would make the cached index stale
            path.write_text(text)
    return Splits(**{part: out / f"{part}.txt" for part in lines})


def run_cell(
    cell: Cell, point: Point, setting: Setting, splits: Splits, folder: Path, *, device: str, threads: int
) -> dict[str, Any]:
    """Train a cell, or resume it; its measurements as plain JSON values.

    Args:
        cell: to run.
        point: its learning rate, weight decay and target decay.
        setting: its size.
        splits: the images.
        folder: of the run, which is kept.
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
            keep_best="none",
            on_collapse="warn",  # a result, too
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
    """kNN accuracy on the tuning images; with `test` also kNN and linear accuracy and hits on the test images."""
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
    """Whether each test image was classified correctly, one bit each, as hexadecimal digits."""
    return np.packbits(right.cpu().numpy()).tobytes().hex()


def unpack(digits: str, images: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """The inverse of `pack`: bool [images]."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))[:images].astype(bool)


def curves(folder: Path) -> dict[str, list[float | None]]:
    """The run's metrics at up to `POINTS` steps: step, losses, gradient norm, standard deviation and rank."""
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
    """Cosines between the views' gradients, and ranks, at every checkpoint of a run, on the same batches each time."""
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
    """The first batches of an order with a seed that no cell has."""
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
