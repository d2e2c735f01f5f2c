"""Implementations of view making: our engine's backends, and what else people use."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.runtime import InputError
from pipelines.views.engine import ViewEngine
from pipelines.views.params import ViewParams
from pipelines.views.sampling import draw
from pipelines.views.spec import ViewSpec

MakeViews = Callable[[Sequence[DecodedBatch]], Iterator[list[Tensor]]]
"""From batches on the device to the views of each, one after the other: one [N, 3, S, S] per spec."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all implementations share.

    Attributes:
        specs: V views.
        device: of the decoded images and the views.
        dtype: of the views.
        batch_size: images of a batch.
        threads: of the implementations with threads of their own.
    """

    specs: Sequence[ViewSpec]
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to make the views.

    Attributes:
        what: one line that says what it is.
        build: makes the function; raises InputError or ImportError if something is missing here.
        shares_decisions: whether it takes the parameters of `sample`; else it samples its own, in the same ranges.
    """

    what: str
    build: Callable[[Setup], MakeViews]
    shares_decisions: bool = True


def sample(setup: Setup, batch: DecodedBatch) -> ViewParams:
    """The augmentation parameters of a batch, the same for everyone at any time."""
    return draw(setup.specs, batch.sizes, seed=0, epoch=0, index=batch.index)


def _engine(backend: str) -> Callable[[Setup], MakeViews]:
    """Our engine with one of its backends."""

    def build(setup: Setup) -> MakeViews:
        if backend == "fused" and setup.device.type != "cuda":
            raise InputError("it needs CUDA; in Triton's interpreter its speed says nothing")
        engine = ViewEngine(setup.specs, device=setup.device, backend=backend, dtype=setup.dtype)
        return lambda batches: (engine(batch, sample(setup, batch)) for batch in batches)

    return build


def _compiled(setup: Setup) -> MakeViews:
    from benchmarks.implementations.compiled_views import compile_photometric, make_views

    function = compile_photometric()
    return lambda batches: (
        make_views(batch, setup.specs, sample(setup, batch), function=function, dtype=setup.dtype) for batch in batches
    )


def _torchvision(setup: Setup) -> MakeViews:
    from benchmarks.implementations.torchvision_baseline import torchvision_view

    def views(batch: DecodedBatch) -> list[Tensor]:
        params = sample(setup, batch)
        return [
            torch.stack([torchvision_view(batch.image(n), spec, params.view(v), n) for n in range(len(batch))]).to(
                setup.dtype
            )
            for v, spec in enumerate(setup.specs)
        ]

    return lambda batches: (views(batch) for batch in batches)


def _dali(setup: Setup) -> MakeViews:
    from benchmarks.implementations.dali_baseline import dali_views

    return dali_views(
        setup.specs,
        batch_size=setup.batch_size,
        device=setup.device,
        threads=setup.threads,
        dtype=setup.dtype,
    )


def _kornia(setup: Setup) -> MakeViews:
    from benchmarks.implementations.kornia_baseline import kornia_views

    return kornia_views(setup.specs, device=setup.device, dtype=setup.dtype)


IMPLEMENTATIONS = {
    "fused": Implementation(
        what="our engine, Triton kernels; sampling of parameters and job tables are timed too", build=_engine("fused")
    ),
    "native": Implementation(
        what="our engine, C after torch's resize; sampling of parameters is timed too", build=_engine("native")
    ),
    "reference": Implementation(
        what="our engine, plain torch; sampling of parameters is timed too", build=_engine("reference")
    ),
    "compiled": Implementation(
        what="plain torch: the reference's resize image by image, then one branch-free function of the batch through "
        "torch.compile, every image taking every operation; sampling of parameters is timed too",
        build=_compiled,
    ),
    "torchvision": Implementation(
        what="torchvision.transforms.v2 functions, image by image; our sampling of parameters is timed too",
        build=_torchvision,
    ),
    "dali": Implementation(
        what="NVIDIA DALI's operators in one graph, one batch at a time; it samples its own parameters from the same "
        "distributions, and its colours differ",
        build=_dali,
        shares_decisions=False,
    ),
    "kornia": Implementation(
        what="kornia.augmentation, the crop image by image and without antialiasing; it samples its own parameters "
        "from the same distributions",
        build=_kornia,
        shares_decisions=False,
    ),
}
"""Every implementation by name, in the order of their trials."""


def version(package: str) -> str | None:
    """Version of an installed package, None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
