"""Runs on data at a URL: the same numbers as on a disk, also when the server died and the run was resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mvssl
from mvssl.cli.train import body, parse
from mvssl.config.evaluation import EvalOptions
from mvssl.config.recipe import Recipe
from mvssl.monitor.bottleneck import describe_bottleneck
from pipelines.loader import StageSeconds
from pipelines.names import located
from pipelines.runtime import InputError
from tests.samples.remote_server import RemoteFolder
from tests.samples.tiny_runs import crash_at, metrics, train

pytest.importorskip("aiohttp")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipelines.storage.remote_files._FIRST_WAIT", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


def test_a_run_over_http_that_loses_its_server_resumes_with_the_same_numbers(
    forms: dict[str, Path], finished: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    remote = {"cache_size": "0", "retries": 2, "timeout": 2.0}  # every image of every epoch is read from the server
    out = tmp_path / "run"
    with RemoteFolder(forms["shards"]) as server:
        asked = server.faults.asked

        def dies(path: str, number: int) -> int:
            shards = sum(path.endswith(".tar") and "/train/" in path for _, path, _ in asked)
            return 503 if path.endswith(".tar") and shards > 45 else 0

        server.faults.status = dies
        with pytest.raises(InputError, match=r"3 attempts .* status 503.*--resume"):
            train(tiny_recipe, located(server.url), out, remote=remote)
        assert 0 < len(metrics(out)) < len(metrics(finished))
        server.faults.status = lambda path, number: 500 if path.endswith(".tar") and not number % 3 else 0
        train(tiny_recipe, located(server.url), out, remote=remote, resume=True)
    assert metrics(out) == metrics(finished)
    assert json.loads((out / "config.json").read_text())["options"]["data"] == server.url


def test_tars_at_a_url_give_the_same_numbers(
    forms: dict[str, Path], finished: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with RemoteFolder(forms["shards"]) as server:
        splits = ([path.name for path in (forms["shards"] / split).glob("*.tar")] for split in ("train", "val"))
        text = [f"{{{','.join(sorted(names))}}}" if len(names) > 1 else names[0] for names in splits]
        data, val = located(f"{server.url}/train/{text[0]}"), located(f"{server.url}/val/{text[1]}")
        with crash_at(6):
            train(tiny_recipe, data, out, val=val, remote={"block": "64KiB"})
        train(tiny_recipe, data, out, val=val, remote={"cache_size": "0"}, resume=True)
    assert metrics(out) == metrics(finished)


@pytest.fixture
def bucket(forms: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The converted data in a bucket of a local S3 server."""
    pytest.importorskip("s3fs")
    server_of = pytest.importorskip("moto.server")
    import s3fs

    server = server_of.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fs = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}", skip_instance_cache=True)
    fs.mkdir("bucket")
    fs.put(str(forms["shards"]), "bucket/imagenet", recursive=True)
    yield "s3://bucket/imagenet"
    server.stop()


def test_a_run_from_s3_that_crashes_and_resumes_has_the_same_numbers(
    bucket: str, finished: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote: dict[str, Any] = {"cache": str(tmp_path / "cache"), "block": "64KiB"}
    out = tmp_path / "run"
    with crash_at(6):
        train(tiny_recipe, located(bucket), out, remote=remote)
    train(tiny_recipe, located(bucket), out, remote=remote, resume=True)
    assert metrics(out) == metrics(finished)
    assert f"{bucket}/train" in (out / "train.log").read_text()
    assert list((tmp_path / "cache").rglob("*-*"))
    with pytest.raises(InputError, match=r"s3://bucket/none.*no manifest\.json"):
        mvssl.train(tiny_recipe, data="s3://bucket/none", out=tmp_path / "none", device="cpu")
    with pytest.raises(InputError, match=r"s3://nobody/data"):
        mvssl.train(tiny_recipe, data="s3://nobody/data", out=tmp_path / "none", device="cpu")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(InputError, match="set AWS_ACCESS_KEY_ID"):
        mvssl.train(tiny_recipe, data=bucket, out=tmp_path / "none", device="cpu", resume=False)


def test_commands_take_urls(forms: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parsed = parse(["byol_resnet50_200ep", "--data", "s3://b/imagenet", "--out", "run", "--remote.cache-size", "5GB"])
    assert str(parsed.options.data) == "s3://b/imagenet"
    assert parsed.options.remote.cache_bytes == 5 * 10**9
    assert str(EvalOptions(data=Path("gs://b/c"), val=Path("hf://datasets/a/b")).val) == "hf://datasets/a/b"
    with pytest.raises(InputError, match=r"out is 's3://b/run' but must be a folder of this machine"):
        parse(["byol_resnet50_200ep", "--data", "s3://b/imagenet", "--out", "s3://b/run"])
    with RemoteFolder(forms["shards"]) as server:
        assert body(["photos", "--data", server.url, "--print-config", "--remote.cache", str(tmp_path / "c")]) == 0
        assert not server.faults.parts()  # the index is enough
    assert json.loads(capsys.readouterr().out)["name"] == "photos"


def test_the_network_is_named_as_the_bottleneck() -> None:
    import torch

    stages = StageSeconds(storage=9.0, decode=1.0, views=1.0)
    said = describe_bottleneck(0.5, stages, 100, device=torch.device("cpu"), images_per_second=11, remote=True)
    assert "the bottleneck is the network" in said
