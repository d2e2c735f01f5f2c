"""bench_loader runs end to end, and its result is complete."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import bench_loader
from benchmarks.bench_loader import Arguments, setups
from benchmarks.harness.processes import Trial
from benchmarks.harness.trials import cpu_times
from benchmarks.implementations.loaders import indices_of, our_loader, passes_of_trial, peer_loader
from benchmarks.implementations.peers import PEERS as LIBRARIES
from pipelines.conversion.command import Convert, convert
from pipelines.order import Order
from pipelines.runtime import InputError
from tests.benchmarks.conftest import Bench

needs_ffcv = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed: run tools/install_ffcv.sh"
)
OURS = {"folder + pillow", "folder + pillow, chunked order"}
DALI = {"DALI, one graph"}
MISSING = set() if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali") else DALI
PEERS = ({"DataLoader"} | DALI) - MISSING
COUNT = 12
SMALL = {"batch_size": 4, "num_batches": 3, "repeats": 2, "recipe": "byol_resnet18_tiny_imagenet"}


def test_command_writes_a_complete_result(folder: Path, bench: Bench) -> None:
    words = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--cold", "--chunk", "2", "--window", "4", "--disk", "any disk"]
    result, _ = bench(bench_loader, folder, "--decoders", "pillow", "--workers", "2", *words)
    assert (result["benchmark"], result["device"], result["cold"]) == ("loader", "cpu", True)
    assert (result["chunk"], result["window"], result["disk"]) == (2, 4, "any disk")
    assert (result["views_per_image"], result["sizes"]) == (5, [32, 32, 16, 16, 32])
    assert set(result["contenders"]) == OURS | PEERS
    for row in result["contenders"].values():
        assert row["views_per_second"] == pytest.approx(5 * row["images_per_second"])
        assert row["spread"]["min"] <= row["images_per_second"] <= row["spread"]["max"]
        assert row["spread"]["n"] == 2
        assert 0 <= row["cached_share_before_turns"] <= 1
    ours, theirs = result["contenders"]["folder + pillow"], result["contenders"]["DataLoader"]
    assert set(ours["stage_seconds"]) == {"storage", "decode", "views"}
    assert all(seconds > 0 for seconds in ours["stage_seconds"].values())
    assert (ours["stage_images"], ours["bad"], theirs["workers"]) == (24, 0, 2)
    if sys.platform == "linux":
        assert (ours["peak_memory_mib"]["processes"], theirs["peak_memory_mib"]["processes"]) == (1, 3)
        for row in (ours, theirs):
            assert 50 < row["peak_memory_mib"]["pss"] <= row["peak_memory_mib"]["rss"]
    assert set(result["times_dataloader"]) == OURS | PEERS - {"DataLoader"}
    assert (set(result["left_out"]), result["failed"]) == (MISSING, {})
    assert result["environment"]["command"].startswith(
        f"python -m benchmarks.bench_loader {folder.name} --decoders pillow"
    )
    assert result["environment"]["command"].endswith("--cold --chunk 2 --window 4 --disk 'any disk'")


@pytest.mark.timing
def test_cached_images_are_loaded_without_reading_or_decoding(folder: Path) -> None:
    planned = setups(Arguments(data=(folder,), decoders=("pillow",), cache=True, **SMALL))  # type: ignore[arg-type]
    assert [name for name in planned if name not in PEERS | DALI] == ["folder + pillow", "folder + pillow, kept"]
    spent = {}
    for name in ("folder + pillow", "folder + pillow, kept"):
        with our_loader(planned[name]) as trials:
            trials[name]()
            spent[name] = trials[name]()["stage_seconds"]
    plain, kept = spent["folder + pillow"], spent["folder + pillow, kept"]
    assert kept["storage"] + kept["decode"] < 0.5 * (plain["storage"] + plain["decode"])


def test_a_trial_is_exact_and_ends_with_an_epoch() -> None:
    order = Order(num_images=13, batch_size=4, seed=0)  # three steps an epoch
    assert passes_of_trial(order, num_batches=2, first_epoch=5) == [(5, 1)]
    assert passes_of_trial(order, num_batches=3, first_epoch=5) == [(5, 0)]
    assert passes_of_trial(order, num_batches=7, first_epoch=5) == [(5, 2), (6, 0), (7, 0)]
    indices = indices_of(order, [(5, 2), (6, 0)])
    assert indices == [order.batch(5, 2).tolist(), order.batch(6, 0).tolist()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cold": True, "cache": True}, "cold and cache exclude each other"),
        ({"data": ()}, "data is missing"),
        ({"decoders": ()}, "decoders is empty"),
        ({"workers": 0}, "workers is 0"),
        ({"repeats": 0}, "repeats is 0"),
    ],
)
def test_invalid_arguments_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(Arguments(data=(folder,)), **changes)


def test_data_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="'folder' twice"):
        setups(Arguments(data=(folder, folder)))
    with pytest.raises(InputError, match="at most 3"):
        setups(Arguments(data=(folder,), batch_size=4, num_batches=4, cold=True))
    with pytest.raises(InputError, match="window is 8 but must be at least the 9 images"):
        setups(Arguments(data=(folder,), batch_size=4, chunk=9, window=8))
    with pytest.raises(InputError, match="lower batch_size"):
        setups(Arguments(data=(folder,), batch_size=13))


def test_ffcv_takes_part_where_a_beton_file_is(folder: Path, tmp_path: Path) -> None:
    convert(Convert(src=folder, dst=tmp_path / "beton", format="beton"))
    planned = setups(Arguments(data=(folder, tmp_path / "beton"), decoders=("pillow",), batch_size=4, num_batches=3))
    ffcv = ["ffcv", "ffcv, crops and flips only"]
    assert list(planned) == ["folder + pillow", "beton + pillow", "DALI, one graph", *ffcv, "DataLoader"]
    assert [planned[name].photometric for name in ffcv] == [True, False]
    assert {planned[name].data for name in ffcv} == {tmp_path / "beton"}


@needs_ffcv
@pytest.mark.slow
@pytest.mark.parametrize("photometric", [True, False])
def test_ffcv_loads_the_given_images(tmp_path: Path, photometric: bool) -> None:
    """In a process of its own, as FFCV may hang. Images of one gray value are identified by it, whatever the crop."""
    (tmp_path / "src").mkdir()
    for n in range(COUNT):
        Image.new("RGB", (48, 40 + n), (20 * n + 10,) * 3).save(tmp_path / "src" / f"{n:02d}.jpg")
    convert(Convert(src=tmp_path / "src", dst=tmp_path / "beton", format="beton"))
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from benchmarks.implementations.ffcv_baseline import FfcvLoader\n"
        "from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec\n"
        "plain = dict(task='t', is_target=True, jitter_p=0.0, grayscale=0.0, blur=0.0)\n"
        "specs = [ViewSpec(name='a', size=32, **plain), ViewSpec(name='b', size=16, **plain)]\n"
        "loader = FfcvLoader(Path(sys.argv[1]), specs, batch_size=4, workers=1, device=torch.device('cpu'),\n"
        f"                    photometric={photometric})\n"
        "for batches in ([[3, 1, 11, 0], [5, 4, 2, 10]], [[7, 6, 8, 9]]):\n"
        "    taken = list(loader(batches))  # all are held: they must not change\n"
        "    assert len(taken) == len(batches)\n"
        "    for views, wanted in zip(taken, batches):\n"
        "        for view, spec in zip(views, specs):\n"
        "            assert view.shape == (4, 3, spec.size, spec.size) and view.dtype == torch.float32\n"
        "            mean, std = (torch.tensor(c)[:, None, None] for c in (IMAGENET_MEAN, IMAGENET_STD))\n"
        "            levels = (view * std + mean) * 255 - (20 * torch.tensor(wanted) + 10)[:, None, None, None]\n"
        "            assert levels.abs().max() < 3, levels.abs().amax((1, 2, 3))\n"
        "assert not [t for t in __import__('threading').enumerate() if 'Epoch' in type(t).__name__]\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "beton" / "images.beton")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_peers_that_are_not_installed_are_left_out_with_the_remedy(folder: Path) -> None:
    planned = setups(Arguments(data=(folder,), decoders=("pillow",), peers=True, **SMALL))  # type: ignore[arg-type]
    assert set(LIBRARIES) < set(planned)
    for name, peer in LIBRARIES.items():
        if importlib.util.find_spec(name.replace("-", "_").replace("solo_learn", "solo")) is None:
            with (
                pytest.raises(InputError, match=f"{peer.package} is not installed: pip install"),
                peer_loader(planned[name]),
            ):
                pass


def test_cpu_times_are_compared_trial_by_trial() -> None:
    trials = {
        "ours": [Trial(report={"images": 10, "cpu_seconds": 0.02}), Trial(report={"images": 10, "cpu_seconds": 0.04})],
        "theirs": [Trial(report={"images": 10, "cpu_seconds": 0.06}), Trial(report={"images": 5, "cpu_seconds": 0.06})],
    }
    times = cpu_times(trials, "ours")
    assert times["ours"] == {"cpu_milliseconds": {"median": pytest.approx(3.0), "min": 2.0, "max": 4.0, "n": 2}}
    assert times["theirs"]["times_cpu"] == {"median": pytest.approx(3.0), "min": 3.0, "max": 3.0, "n": 2}
