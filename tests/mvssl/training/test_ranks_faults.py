"""An error on one rank ends the others with a message, before any of them waits for it."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mvssl.cli.train import body
from mvssl.config.options import RunOptions
from mvssl.config.recipe import Evaluation, Recipe
from mvssl.distributed import join_world
from mvssl.evaluate.features import extract_features
from mvssl.evaluate.session import Session
from mvssl.ranks import OtherRankFailed
from mvssl.training.run import run
from mvssl.training.run_data import data_paths as paths_of_data
from pipelines.loading.fetch import too_many_bad
from pipelines.runtime import InputError, run_cli
from pipelines.storage import open_source
from tests.samples.ranks import results, run_ranks


def failing_on_rank_one() -> tuple[str, bool]:
    """Each rank's error when rank 1 fails between two collectives, and whether it is still connected afterwards."""
    try:
        with join_world(cuda=False) as world:
            world.any(False)
            if world.rank == 1:
                raise InputError("a fault of rank 1 alone")
            world.any(False)
    except (OtherRankFailed, InputError) as error:
        return str(error), dist.is_initialized()
    return "nothing", dist.is_initialized()


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_the_others() -> None:
    (message, _), (own, connected) = results(run_ranks(failing_on_rank_one, 2))
    assert message.startswith("another process of the run is gone (")
    assert own == "a fault of rank 1 alone"
    assert connected  # disconnecting may wait for the others (NCCL) before the message is shown


def errors_of_collective_work(messages: list[str]) -> str:
    """Each rank's error when ranks fail with these messages ("" does not fail) in collective work."""

    def work() -> None:
        if messages[world.rank]:
            raise InputError(messages[world.rank])

    with join_world(cuda=False) as world:
        try:
            world.run_on_all(work)
        except (OtherRankFailed, InputError) as error:
            return f"{type(error).__name__} {error}"
        return "nothing"


@pytest.mark.slow
@pytest.mark.parametrize("messages", [["", ""], ["same", "same"], ["one", "two"], ["", "two"], ["one", ""]])
def test_an_error_on_all_ranks_is_reported_once(messages: list[str]) -> None:
    met = results(run_ranks(errors_of_collective_work, 2, messages))
    expected = [f"InputError {message}" if message else "" for message in messages]
    if messages == ["same", "same"]:
        expected[1] = ""
    elsewhere = "OtherRankFailed another process of the run failed and says why." if any(messages) else "nothing"
    assert met == [message or elsewhere for message in expected]


def test_a_batch_larger_than_the_data_is_reported_by_rank_0(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(tiny_recipe, batch_size=64)
    first, second = run_ranks(run, 2, recipe, RunOptions(data=images, out=tmp_path / "run", device="cpu"))
    assert (first.error, second.error) == ("InputError", "OtherRankFailed")
    assert "batch_size is 64 but the data set has only 36 images" in first.message


def data_paths(data: list[str]) -> tuple[Path, Path | None]:
    """Paths of this rank's images, as a run determines them."""
    with join_world(cuda=False) as world:
        return world.run_on_all(partial(paths_of_data, Path(data[world.rank]), None, world))


@pytest.mark.slow
def test_validation_images_on_one_machine_only_are_refused_without_a_hang(images: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(images / "train")
    first, second = run_ranks(data_paths, 2, [str(images), str(tmp_path)])
    assert (first.error, second.error) == ("OtherRankFailed", "InputError")
    assert "has no validation part on rank 1 but one on rank 0: give every machine the same data" in second.message
    first, second = run_ranks(data_paths, 2, [str(images), str(tmp_path / "missing")])
    assert (first.error, second.error) == ("OtherRankFailed", "InputError")


def embed(train: str) -> int:
    """Number of images embedded by all ranks."""
    with join_world(cuda=False) as world:
        features = extract_features(
            Session(device=torch.device("cpu"), world=world),
            torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
            open_source(Path(train)),
            Evaluation(resize=32, crop=32, k=(1,)),
        )
        return len(features.index)


@pytest.mark.slow
def test_bad_images_are_counted_over_all_ranks(images: Path, tmp_path: Path) -> None:
    """Every other image is bad on one rank only: too many of its own images, but not of all."""
    shutil.copytree(images / "train", tmp_path / "train")
    files = sorted((tmp_path / "train").rglob("*.jpg"))
    for file in files[1:24:2]:
        file.write_bytes(b"")
    assert too_many_bad(12, 18)
    assert not too_many_bad(12, 36)
    assert results(run_ranks(embed, 2, str(tmp_path / "train"))) == [24, 24]
    for file in files[:26]:
        file.write_bytes(b"")
    first, second = run_ranks(embed, 2, str(tmp_path / "train"))
    assert (first.error, second.error) == ("InputError", "OtherRankFailed")
    assert "26 of the 36 images" in first.message


@pytest.mark.parametrize("arguments", [["nope"], ["demo", "--epochs", "x"], ["demo", "--epochs", "0"]])
def test_a_wrong_command_is_explained_once_on_each_machine(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said, codes = [], []
    for rank, local in ((0, 0), (1, 1), (2, 0)):
        for name, value in {"WORLD_SIZE": 3, "RANK": rank, "LOCAL_RANK": local}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit) as left:
            run_cli(lambda: body(arguments))
        codes.append(left.value.code)
        captured = capfd.readouterr()
        said.append(captured.out + captured.err)
    assert len(set(codes)) == 1
    assert codes[0] in (1, 2)
    assert said[0] == said[2] != ""
    assert said[1] == ""


def test_more_processes_than_gpus_are_refused_before_a_gpu_is_used(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    options = RunOptions(data=None, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"Local rank 1 has no GPU.*1 GPUs here.*start fewer"):
        run(tiny_recipe, options)
