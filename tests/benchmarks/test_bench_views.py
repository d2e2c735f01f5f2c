"""bench_views runs end to end, and its result holds the fields that benchmarks/README.md lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import bench_views
from benchmarks.bench_views import Arguments, measure
from benchmarks.implementations import views as view_implementations
from pipelines import DecodedBatch, InputError
from pipelines.decode import missing_dali
from tests.benchmarks.conftest import Bench


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for n in range(4):
        Image.fromarray(rng.integers(0, 256, (64 + n, 70, 3), dtype=np.uint8)).save(folder / f"{n}.jpg")
    return folder


TINY = ("--num-images", "4", "--size", "32", "--local-size", "16", "--blur-kernel", "5", "--repeats", "2")


def test_command_writes_a_complete_result(photos: Path, bench: Bench) -> None:
    names = ["fused", "reference", "torchvision", *(["dali"] if missing_dali() is None else [])]
    result, said = bench(bench_views, photos, *TINY, "--contenders", *names)
    assert "left out fused: it needs CUDA" in said
    assert next(iter(result["left_out"])) == "fused"
    assert result["failed"] == {}
    for name, entry in result["contenders"].items():
        assert entry["views_per_second"] == pytest.approx(5 * entry["images_per_second"])
        spread = entry["spread"]
        assert spread["n"] == 2
        assert 0 < spread["min"] <= entry["images_per_second"] <= spread["max"]
        assert entry["host_share"] == 1.0
        assert entry["shares_decisions"] == (name != "dali")
        assert (entry["difference_from_torchvision_cpu"] is None) == (name == "dali")
    same = result["contenders"]["reference"]["difference_from_torchvision_cpu"]
    assert same["normalised"] < 1e-4
    assert 0 <= same["mean_levels"] <= same["levels"] < 0.01
    assert result["contenders"]["torchvision"]["difference_from_torchvision_cpu"]["normalised"] == 0.0
    assert result["contenders"]["torchvision"]["times_torchvision"] is None
    assert result["contenders"]["reference"]["times_torchvision"]["n"] == 2
    assert missing_dali() or result["contenders"]["dali"]["times_torchvision"]["median"] > 0


def test_views_of_a_preset_are_compared_too(photos: Path, bench: Bench) -> None:
    """Views that are turned and rotated by any angle, in every implementation that can be had."""
    names = ["native", "reference", "torchvision", *(["dali"] if missing_dali() is None else [])]
    result, _ = bench(bench_views, photos, *TINY, "--contenders", *names, "--view-preset", "astronomy")
    assert (result["view_preset"], result["failed"]) == ("astronomy", {})
    for name in {"native", "reference"} & set(result["contenders"]):
        assert result["contenders"][name]["difference_from_torchvision_cpu"]["mean_levels"] < 0.05
    assert {"reference", "torchvision"} <= set(result["contenders"])


def test_half_precision_is_as_far_off_as_its_rounding(photos: Path) -> None:
    tiny = Arguments(
        data=photos, dtype="bfloat16", contenders=("reference",), num_images=4, size=32, local_size=16, blur_kernel=5
    )
    (entry,) = measure(tiny, command="")["contenders"].values()
    assert 1e-4 < entry["difference_from_torchvision_cpu"]["normalised"] < 0.01


def test_a_failure_costs_no_other_its_numbers(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(setup: view_implementations.Setup) -> view_implementations.MakeViews:
        def make(batches: Sequence[DecodedBatch]) -> Iterator[list[torch.Tensor]]:
            raise RuntimeError("out of order")

        return make

    broken = view_implementations.Implementation(what="broken", shares_decisions=False, build=fails)
    monkeypatch.setitem(view_implementations.IMPLEMENTATIONS, "kornia", broken)
    tiny = Arguments(
        data=photos, contenders=("kornia", "reference"), num_images=4, size=32, local_size=16, blur_kernel=5, repeats=1
    )
    result = measure(tiny, command="")
    assert result["failed"] == {"kornia": "RuntimeError: out of order"}
    assert list(result["contenders"]) == ["reference"]


def test_wrong_arguments_are_explained(photos: Path) -> None:
    with pytest.raises(InputError, match=r"num_images is 5 but .* has only 4 images"):
        measure(Arguments(data=photos, num_images=5), command="")
    with pytest.raises(InputError, match="repeats is 0 but must be 1 or more"):
        Arguments(data=photos, repeats=0)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            measure(Arguments(data=photos, device="cuda"), command="")
