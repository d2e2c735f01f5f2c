"""What makes views in the benchmark: our engine's backends, and what else people use."""

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

MakeAll = Callable[[Sequence[DecodedBatch]], Iterator[list[Tensor]]]
"""From batches on the device, one after the other, to the views of each: one [N, 3, S, S] per spec."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all contenders share.

    Attributes:
        specs: V views.
        device: where the decoded images lie and the views are made.
        dtype: of the views.
        batch_size: images of a batch.
        threads: of the contenders with threads of their own.
    """

    specs: Sequence[ViewSpec]
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to make the views.

    Attributes:
        what: one line that says what it is.
        shares_decisions: whether it makes the views that `decide` says; else it draws for itself, in the same ranges.
        build: makes the function; raises InputError or ImportError where something is missing here.
    """

    what: str
    shares_decisions: bool
    build: Callable[[Setup], MakeAll]


def decide(setup: Setup, batch: DecodedBatch) -> ViewParams:
    """The decisions for a batch: the same whenever and by whomever it is asked."""
    return draw(setup.specs, batch.sizes, seed=0, epoch=0, index=batch.index)


def _engine(backend: str) -> Callable[[Setup], MakeAll]:
    """Our engine with one of its backends."""

    def build(setup: Setup) -> MakeAll:
        if backend == "fused" and setup.device.type != "cuda":
            raise InputError("it needs CUDA; in Triton's interpreter its speed says nothing")
        engine = ViewEngine(setup.specs, device=setup.device, backend=backend, dtype=setup.dtype)
        return lambda batches: (engine(batch, decide(setup, batch)) for batch in batches)

    return build


def _compiled(setup: Setup) -> MakeAll:
    """Plain torch through torch.compile after the resize."""
    from benchmarks.contenders.baselines.compiled_views import compile_photometric, make_views

    function = compile_photometric()
    return lambda batches: (
        make_views(batch, setup.specs, decide(setup, batch), function=function, dtype=setup.dtype) for batch in batches
    )


def _torchvision(setup: Setup) -> MakeAll:
    """torchvision.transforms.v2, image by image."""
    from benchmarks.contenders.baselines.torchvision_views import torchvision_view

    def views(batch: DecodedBatch) -> list[Tensor]:
        params = decide(setup, batch)
        return [
            torch.stack([torchvision_view(batch.image(n), spec, params.view(v), n) for n in range(len(batch))]).to(
                setup.dtype
            )
            for v, spec in enumerate(setup.specs)
        ]

    return lambda batches: (views(batch) for batch in batches)


def _dali(setup: Setup) -> MakeAll:
    """An all-DALI graph."""
    from benchmarks.contenders.baselines.dali_views import dali_views

    return dali_views(
        setup.specs,
        batch_size=setup.batch_size,
        device=setup.device,
        threads=setup.threads,
        dtype=setup.dtype,
    )


def _kornia(setup: Setup) -> MakeAll:
    """kornia.augmentation."""
    from benchmarks.contenders.baselines.kornia_views import kornia_views

    return kornia_views(setup.specs, device=setup.device, dtype=setup.dtype)


CONTENDERS = {
    "fused": Contender(
        what="our engine, Triton kernels; its draw and tables are timed too",
        shares_decisions=True,
        build=_engine("fused"),
    ),
    "native": Contender(
        what="our engine, C behind torch's resize; its draw is timed too",
        shares_decisions=True,
        build=_engine("native"),
    ),
    "reference": Contender(
        what="our engine, plain torch; its draw is timed too", shares_decisions=True, build=_engine("reference")
    ),
    "compiled": Contender(
        what="plain torch: resize image by image as the reference, then one branch-free function of the batch through "
        "torch.compile, every image taking every operation; the draw is timed too",
        shares_decisions=True,
        build=_compiled,
    ),
    "torchvision": Contender(
        what="torchvision.transforms.v2 functions, image by image; our draw is timed too",
        shares_decisions=True,
        build=_torchvision,
    ),
    "dali": Contender(
        what="NVIDIA DALI's operators in one graph, one batch at a time; it draws for itself from the same "
        "distributions, and its colours differ",
        shares_decisions=False,
        build=_dali,
    ),
    "kornia": Contender(
        what="kornia.augmentation, the crop image by image and without antialiasing; it draws for itself from the "
        "same distributions",
        shares_decisions=False,
        build=_kornia,
    ),
}
"""Every contender by name, in the order of their turns."""


def version(package: str) -> str | None:
    """Version of an installed package, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
