"""Fits a recipe that asks for it to the images and the machine, once, before a run starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mvssl.config.options import Execution
from mvssl.config.recipe import Recipe
from mvssl.ranks import process_local_rank, rank_count
from mvssl.recipes import FITTED, Situation, all_recipes
from pipelines.runtime import InputError
from pipelines.storage import RemoteOptions, Source, open_source, split_paths
from pipelines.storage.image_facts import facts_of
from pipelines.storage.shards import ShardSource

_MEASURED = 128  # images whose sizes are read


def fit_recipe(
    recipe: Recipe,
    given: Mapping[str, Any],
    *,
    data: Path | Source | None,
    device: str = "auto",
    resumes: Path | None = None,
    default: bool = False,
    progress: Callable[[int], None] | None = None,
    remote: RemoteOptions | None = None,
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe that a run starts with, and lines for the log on what was chosen.

    Args:
        recipe: as it is named; only its backbone's name may change unless it has an entry in `FITTED`.
        given: values that the user has chosen, by dotted field, which are kept.
        data: the images; None if they are not given, which the run reports.
        device: as in `RunOptions`.
        resumes: folder of the run that is resumed, if any, which keeps the recipe that it was started with.
        default: whether no recipe was named; a resumed run then has any recipe.
        progress: called with the number of images found so far while a folder is indexed.
        remote: how data at a URL are read and cached; None for the defaults.

    Raises:
        InputError: the images or the device are not there.
    """
    all_recipes()
    given, recipe = with_architecture(given, recipe, resumes=resumes)
    if recipe.name not in FITTED:
        return recipe, ()
    if resumes is not None:
        from mvssl.runs.folder import RunFolder

        with suppress(InputError):  # the run itself reports it
            begun = RunFolder(resumes).recipe()
            if default or begun.name == recipe.name or begun.name not in all_recipes():
                return begun, ()
    if data is None:
        return recipe, ()
    from mvssl.config.device import resolve_device  # with torch

    where = resolve_device(device, local_rank=process_local_rank() if rank_count() > 1 else None)
    if isinstance(data, Path):
        source = open_source(split_paths(data, remote=remote)[0], progress=progress, remote=remote)
    else:
        source = data
    try:
        situation = Situation(
            images=len(source),
            short_side=short_side(source),
            device="cuda" if where.type == "cuda" else "cpu",
            cores=_cores(),
            ranks=rank_count(),
            bf16=_has_bf16(),
            given=given,
            fits=_fits(where),
        )
    finally:
        if isinstance(data, Path):
            source.close()
    fitted = FITTED[recipe.name](situation)
    return fitted.recipe, fitted.notes


def with_architecture(
    given: Mapping[str, Any], recipe: Recipe, *, resumes: Path | None
) -> tuple[Mapping[str, Any], Recipe]:
    """The given fields and the recipe, with the backbone of the pretrained weights that are given, if they name one.

    A backbone that is given stays, and a resumed run has its own.
    """
    text = str(given.get("backbone.pretrained") or "")
    if not text or "backbone.name" in given:
        return given, recipe
    name = None
    if resumes is not None:
        from mvssl.runs.folder import RunFolder

        with suppress(InputError):  # the run itself reports it
            name = RunFolder(resumes).recipe().backbone.name
    if name is None:
        from mvssl.weights.pretrained import named_architecture  # with torch

        name = named_architecture(text)
    if name is None:
        return given, recipe
    return {**given, "backbone.name": name}, replace(recipe, backbone=replace(recipe.backbone, name=name))


def short_side(source: Source) -> int:
    """Median short side in pixels of up to 128 images, evenly spaced, from their headers; 224 if none can be read."""
    from pipelines.decode.pillow import open_image
    from pipelines.decode.sniff import sniff

    limits, sides = facts_of(source).limits, []
    indices = np.unique(np.linspace(0, len(source) - 1, _MEASURED).astype(int))
    if isinstance(source, ShardSource):  # their index says it
        return int(np.median(source.sizes[indices].min(axis=1)))
    for index in indices.tolist():
        with suppress(Exception):  # Pillow raises many types on broken files, which the decoder names
            data = source.read(index)
            header = sniff(data)
            if header is not None:
                sides.append(min(header.width, header.height))
                continue
            with open_image(data, limits) as image:
                sides.append(min(image.size))
    return int(np.median(sides)) if sides else 224


def _cores() -> int:
    """CPU cores of this run: those that the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_bf16() -> bool:
    """Whether the CPU has instructions for bf16; False where torch does not say."""
    import torch

    found = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(found is not None and found())


def _fits(device: Any) -> Callable[[Recipe], bool]:
    """Whether a recipe's steps fit into the device's memory; everything does on a CPU."""
    if device.type != "cuda":
        return lambda _: True
    from mvssl.training.memory import fits_on

    def fits(recipe: Recipe) -> bool:
        return fits_on(recipe, Execution(), device)(recipe.batch_size // rank_count())

    return fits
