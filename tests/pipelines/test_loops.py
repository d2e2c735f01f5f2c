"""The loader in other people's loops: the guide's examples run, and give the loader's own batches."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import InputError, Loader, Order, Ranks, ViewBatch, byol_views, source_of

GUIDE = Path(__file__).resolve().parents[2] / "pipelines/LOOPS.md"
VIEWS = byol_views(size=16)


def examples() -> dict[str, str]:
    """The guide's code by the heading above it."""
    parts = [part for part in GUIDE.read_text().split("\n## ")[1:] if "```python\n" in part]
    return {part.partition("\n")[0]: part.partition("```python\n")[2].partition("```")[0] for part in parts}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loops")
    generator = np.random.default_rng(3)
    for n in range(18):
        pixels = generator.integers(0, 256, (48, 40 + n, 3), dtype=np.uint8)
        (folder / f"photos/c{n % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"photos/c{n % 2}/{n:02d}.png")
    return folder


def test_the_guide_has_an_example_of_each_loop() -> None:
    assert list(examples()) == ["Plain PyTorch", "Lightning", "lightly"]


@pytest.mark.parametrize(
    ("loop", "needs"), [("Plain PyTorch", "torch"), ("Lightning", "lightning"), ("lightly", "lightly")]
)
def test_the_examples_run(loop: str, needs: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(examples()[loop], str(GUIDE), "exec")
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    monkeypatch.chdir(photos)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)
    assert names["loader"].state_dict() == {"epoch": 2, "step": 0}
    loss: torch.Tensor = names["trainer"].callback_metrics["loss"] if "trainer" in names else names["loss"]
    assert torch.isfinite(loss)


def copies(batches: Any) -> list[torch.Tensor]:
    return [part.clone() for batch in batches for part in (*batch.views, batch.labels, batch.index)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_an_iterator_is_one_epoch_and_then_the_next(photos: Path) -> None:
    source = source_of(photos / "photos")
    plain = Loader(source, VIEWS, Order(num_images=18, batch_size=4, seed=9))
    expected = [copies(plain.epoch(epoch)) for epoch in range(4)]
    plain.close()
    with Loader.of(photos / "photos", VIEWS, batch_size=4, seed=9) as loader:
        assert len(loader) == 4
        assert equal(copies(loader), expected[0])
        assert equal(copies(loader), expected[1])
        iterator = iter(loader)
        first = copies([next(iterator)])
        state = loader.state_dict()
        del iterator
        assert equal(copies(loader), expected[3])  # as of PyTorch's DataLoader: whole, and in an order of its own
    with Loader.of(photos / "photos", VIEWS, batch_size=4, seed=9) as loader:
        loader.load_state_dict(state)
        assert equal(first + copies(loader), expected[2])
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader))


def test_ranks_share_a_batch(photos: Path) -> None:
    parts = []
    for rank in range(2):
        ranks = Ranks(rank=rank, size=2)
        with Loader.of(photos / "photos", VIEWS, batch_size=4, seed=9, ranks=ranks) as loader:
            parts.append([batch.index for batch in loader])
    with Loader.of(photos / "photos", VIEWS, batch_size=4, seed=9) as loader:
        whole = [batch.index for batch in loader]
    assert all(torch.equal(torch.cat(pair), both) for pair, both in zip(zip(*parts, strict=True), whole, strict=True))


def test_a_batch_moves_as_frameworks_ask_for_it() -> None:
    batch = ViewBatch(views=[torch.zeros(2, 3, 4, 4)], index=torch.arange(2), labels=torch.arange(2))
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert moved.views[0].device.type == "meta"
    assert moved.index is batch.index


def test_wrong_arguments_are_named(photos: Path) -> None:
    for data, options, words in (
        (photos / "photos", {"batch_size": 100}, "batch_size is 100 but the data set has only 18 images"),
        (3, {"batch_size": 2}, "data is 3 but must be a path, a list"),
        (photos / "photos", {"batch_size": 2, "seed": -1}, "seed is -1 but must be"),
    ):
        with pytest.raises(InputError, match=words):
            Loader.of(data, VIEWS, **options)  # type: ignore[arg-type]
