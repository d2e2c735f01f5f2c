"""How often the fused backend launches, where it runs, and what it refuses before anything is launched."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pipelines import DecodedBatch, InputError, ViewEngine, paper_views
from pipelines.batch import check_batch
from pipelines.views import engine as backends
from pipelines.views.engine import choose_backend, fused_obstacle
from tests.samples.fused_samples import decided, noise, spec

engine = pytest.importorskip("pipelines.views.fused.engine", reason="Triton is not installed on this platform")
CUDA = torch.device("cuda")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Grids of the launches, which do nothing."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(engine.Launch, "__call__", lambda self, grid, *arguments: grids.append(grid))
    return grids


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "weights columns rows color"),
        ({"flip": 1.0}, "weights columns rows color"),
        ({"vertical_flip": 1.0}, "weights columns turned_rows color"),
        ({"quarter_turns": 1.0}, "weights columns turned_rows color"),
        ({"rotate": (180, 180)}, "weights columns turned_rows color"),
        ({"rotate": (20, 20)}, "weights columns turned_rows rotate color"),
    ],
    ids=str,
)
def test_only_what_is_turned_takes_other_kernels(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], expected: str
) -> None:
    names = {id(launch): name for name, launch in engine.LAUNCHES.items()}
    called: list[str] = []
    monkeypatch.setattr(engine.Launch, "__call__", lambda self, *arguments: called.append(names[id(self)]))
    specs = (spec(32, blur=0.0, **change), spec(16, blur=0.0, flip=0.0))
    batch, params = decided(noise(*[(40, 50)] * 12), specs)
    engine.make_views(batch, specs, params, dtype=torch.float32)
    assert " ".join(called) == expected


def test_six_launches_for_all_views_of_a_batch(launched: list[tuple[int, ...]]) -> None:
    specs = paper_views(num_local=4)
    batch, params = decided(noise(*[(40, 50)] * 32), specs)
    engine.make_views(batch, specs, params, dtype=torch.bfloat16)
    assert len(launched) == 6
    assert all(grid[0] <= 7 * 32 for grid in launched)


def test_a_batch_without_blur_takes_four(launched: list[tuple[int, ...]]) -> None:
    specs = (spec(32, blur=0.0), spec(16, blur=0.0))
    batch, params = decided(noise((40, 50)), specs)
    engine.make_views(batch, specs, params, dtype=torch.float32)
    assert len(launched) == 4


def test_an_empty_batch_launches_nothing(launched: list[tuple[int, ...]]) -> None:
    specs = (spec(32),)
    batch, params = decided([], specs)
    engine.make_views(batch, specs, params, dtype=torch.float32)
    assert launched == []


def test_auto_takes_fused_where_it_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    assert choose_backend("auto", CUDA) == "fused"
    assert choose_backend("auto", torch.device("cpu")) != "fused"
    assert choose_backend("reference", CUDA) == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    backends._announce.cache_clear()
    assert choose_backend("auto", CUDA) == "reference"
    assert "some GPU has compute capability 7.5, the kernels need 8.0 or newer" in caplog.text
    with pytest.raises(InputError, match=r"backend is 'fused' but cannot be used on device 'cuda': some GPU has"):
        choose_backend("fused", CUDA)
    monkeypatch.setattr(backends, "triton", None)
    with pytest.raises(InputError, match="Triton is not installed"):
        choose_backend("fused", CUDA)


@pytest.mark.skipif(fused_obstacle(torch.device("cpu")) is None, reason="TRITON_INTERPRET=1 runs it on the CPU")
def test_fused_on_the_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="its kernels run on CUDA devices only; take backend 'auto' or 'reference'"):
        ViewEngine(paper_views(), backend="fused")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": torch.tensor([[9, 9], [12, 21]])}, r"sizes\[1\] is \[12, 21\]"),
        ({"sizes": torch.tensor([[9, 9], [13, 20]])}, r"sizes\[1\] is \[13, 20\].*does not lie inside the 963 bytes"),
        ({"sizes": torch.tensor([[0, 9], [12, 20]])}, r"sizes\[0\] is \[0, 9\]"),
        ({"offset": torch.tensor([-1, 243])}, "offset -1"),
        ({"row_stride": torch.tensor([27, 40])}, "row stride 40"),
        ({"row_stride": torch.tensor([27])}, "row_stride has 1 entries for 2 sizes"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_images_outside_the_buffer_are_refused(
    launched: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str, backend: str
) -> None:
    monkeypatch.setattr(backends, "fused_obstacle", lambda device: None)
    specs = (spec(8),)
    batch, params = decided(noise((9, 9), (12, 20)), specs)
    broken: DecodedBatch = dataclasses.replace(batch, **change)
    with pytest.raises(InputError, match=words):
        ViewEngine(specs, backend=backend)(broken, params)
    assert launched == []
    check_batch(batch)
