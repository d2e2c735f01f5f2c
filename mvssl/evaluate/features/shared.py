"""The features that evaluations share: computed once, kept on disk, and taken to where they are used."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvssl.evaluate.features.fill import fill_store
from mvssl.evaluate.features.store import DONE, Dtype, FeatureStore, bytes_needed, open_store
from mvssl.evaluate.session import Session
from mvssl.monitor.display.counting import counting_progress
from pipelines.loading.cache_choice import free_memory
from pipelines.storage.source import Source

EXACT = 2**30
"""Bytes up to which features are kept in float32; more are kept in float16."""

_SHARE = 0.5  # of free memory that features may take


def stored(session: Session, source: Source, what: str, *, drawn: int = 0, seed: int = 0) -> FeatureStore:
    """The features of a source on disk, in a folder named by what they are of; computed where they are not there.

    Raises:
        InputError: images cannot be decoded, or features are not finite.
        OSError: there is no room for them.
    """
    evaluation = session.measured.evaluation
    identity = {
        "weights": session.measured.digest,
        "data": source.fingerprint,
        "resize": evaluation.resize,
        "crop": evaluation.crop,
        "drawn": drawn,
        "seed": seed if drawn else 0,
        "precision": str(session.autocast),
    }
    folder = session.out / "features" / f"{what}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"
    rows = len(source) * (1 + drawn)
    dtype: Dtype = "float32" if bytes_needed(rows, session.width, "float32") <= EXACT else "float16"
    store = open_store(folder, rows=rows, width=session.width, dtype=dtype, identity=identity, world=session.world)
    missing = len(store.to_do(range(rows)))
    if missing:
        size = bytes_needed(rows, session.width, dtype) / 2**20
        session.say(
            f"{missing:,} of {rows:,} features of {source.location} are computed and kept in {folder}: {size:,.0f} MiB"
        )
    fill_store(
        store,
        session.measured.backbone,
        source,
        evaluation,
        drawn=drawn,
        seed=seed,
        device=session.device,
        autocast=session.autocast,
        computing=session.computing,
        world=session.world,
        progress=counting_progress(
            session.console, f"features of {source.location}", total=-(-missing // session.world.size)
        ),
    )
    return store


def loaded(session: Session, store: FeatureStore, labels: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Features [R, D], labels [R] and image numbers [R] of the rows that are there.

    They lie on the device if there is room, else in the machine's memory, else they stay on the disk.
    """
    rows = np.flatnonzero(store.state == DONE)
    device = session.device
    memory = free_memory(device, processes=len(session.world.beside))
    whole = len(rows) == len(store.state)
    values = torch.from_numpy(store.values)  # mapped: read when it is used
    if not whole:
        values = torch.from_numpy(store.values[rows])
    if device.type == "cuda" and values.nbytes < _SHARE * memory.device:
        values = values.to(device)
    elif values.nbytes < _SHARE * memory.host:
        values = values.clone()
    image = torch.from_numpy(rows % len(labels))
    truth = torch.from_numpy(labels)[image]
    return values, truth.to(device), image.to(device)
