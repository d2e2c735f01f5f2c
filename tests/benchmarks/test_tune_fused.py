"""The tuner tries what is launched today among its candidates, and says so where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.tune_fused import CANDIDATES, Arguments, candidates, launched_with, measure, order
from pipelines.runtime import InputError

engine = pytest.importorskip("pipelines.views.fused.engine", reason="Triton is not installed on this platform")


@pytest.mark.parametrize("name", sorted(CANDIDATES))
def test_what_is_launched_today_is_among_the_candidates(name: str) -> None:
    launch = engine.LAUNCHES[name]
    assert (launch.constants, launch.num_warps) in list(candidates(name))
    assert CANDIDATES.keys() == engine.LAUNCHES.keys()
    constants, warps = next(iter(candidates(name)))
    with launched_with(name, constants, warps):
        assert (engine.LAUNCHES[name].constants, engine.LAUNCHES[name].num_warps) == (constants, warps)
    assert engine.LAUNCHES[name] is launch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(InputError, match="there is no CUDA device here; run this on a machine with a GPU"):
        measure(Arguments())


@pytest.mark.gpu
def test_it_times_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tune_fused.WARPS", (4,))
    result = measure(Arguments(num_images=8, repeats=2))
    assert all(kernel["best"]["milliseconds"] > 0 for kernel in result["kernels"].values())
    assert result["environment"]["command"] == "python -m benchmarks.tune_fused --num-images 8 --repeats 2"


def test_what_is_launched_today_is_timed_first_and_every_candidate_once() -> None:
    timed = [(name, tuple(sorted(constants.items())), warps) for name, constants, warps in order(engine.LAUNCHES)]
    count = len(engine.LAUNCHES)
    today = [
        (name, tuple(sorted(launch.constants.items())), launch.num_warps) for name, launch in engine.LAUNCHES.items()
    ]
    assert timed[:count] == today
    every = [
        (name, tuple(sorted(found.items())), warps) for name in engine.LAUNCHES for found, warps in candidates(name)
    ]
    assert sorted(timed) == sorted(every)
