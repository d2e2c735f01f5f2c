"""Every reader of files with damaged and lying files: it succeeds, or says in one sentence why not.

Half a minute by default. On demand, with other files each time: FUZZ_EXAMPLES=2000 pytest tests/test_fuzz.py
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import mvssl
from mvssl.config.options import RunOptions
from mvssl.config.serialize import to_dict
from mvssl.evaluate.compare import summarise
from mvssl.evaluate.feature_store import open_store
from mvssl.evaluate.finetune import listed_images
from mvssl.models.backbones import build_backbone
from mvssl.models.encoder import build_networks
from mvssl.monitor.loggers import MetricLoggers
from mvssl.monitor.report import render
from mvssl.runs.data_record import DataRecord
from mvssl.runs.folder import RunFolder
from mvssl.weights.init_from import init_from
from mvssl.weights.load import BackboneSource, load_backbone
from pipelines import view_sheet
from pipelines.conversion.command import Convert, convert
from pipelines.conversion.destination import Destination
from pipelines.conversion.imagenet import open_archive, read_classes
from pipelines.conversion.shard_state import ShardState
from pipelines.runtime import InputError
from pipelines.storage import open_source
from pipelines.storage.folder import cache_file, load_index, save_index
from pipelines.storage.folder import open_path as open_folder
from pipelines.storage.forms import Request, find_form, open_form
from pipelines.storage.forms.look import look_at
from pipelines.storage.manifest import INDEX_DTYPE
from tests.samples import networks  # noqa: F401  (registers the network of the run)
from tests.samples.file_mutations import mutated
from tests.samples.form_samples import items

BEFORE = Path(__file__).with_name("samples") / "before"
NETWORK = "test_resnet"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
MOST_MEMORY = 400_000  # KB that all files together may take more than the first
MOST_SECONDS = 20  # for one file of some kilobytes
Read = Callable[[Path], object]


def read_all(path: Path) -> None:
    source = open_source(path)
    try:
        for index in range(min(len(source), 12)):
            source.key(index)
            with contextlib.suppress(OSError):
                source.read(index)
        source.read_batch(range(min(len(source), 4)))  # type: ignore[attr-defined]
    finally:
        source.close()


def unsealed(path: Path) -> None:
    """Take checksums out of a file's JSON, so that lies reach what is behind them."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError, KeyError, TypeError):
        content = json.loads(path.read_text())
        content.pop("checksum", None)
        path.write_text(json.dumps(content))


def read_checkpoint(path: Path) -> None:
    """state.pt with its checksum, or checkpoint.json without its own."""
    folder = path.parent
    if path.name == "state.pt":
        meta = json.loads((folder / "checkpoint.json").read_text())
        meta.pop("checksum", None)
        meta["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "checkpoint.json").write_text(json.dumps(meta))
    else:
        unsealed(path)
    run = folder.parents[1]
    load_backbone(BackboneSource(run=run))
    recipe = RunFolder(run).recipe()
    init_from(*build_networks(recipe), recipe, folder)


def read_run(path: Path) -> None:
    unsealed(path)
    run = RunFolder(path.parent if path.parent.name != "eval" else path.parents[1])
    reads: list[Callable[[], object]] = [lambda: render(run), lambda: summarise(run.path), run.options]
    for read in reads:
        with contextlib.suppress(InputError):
            read()
    reads[0]()


def read_record(path: Path) -> None:
    record = DataRecord.load(path)
    if record is not None:
        record.differences(record)


def read_shards(path: Path) -> None:
    """Converted data whose index has the checksum of the manifest."""
    manifest = path.with_name("manifest.json")
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        content = json.loads(manifest.read_text())
        content["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(content))
    read_all(path.parent)


def read_store(path: Path) -> None:
    store = open_store(path.parent, rows=6, width=4, dtype="float32", identity={"network": "a"})
    store.missing(range(6))


def read_weights(path: Path) -> None:
    load_backbone(BackboneSource(weights=path, arch=NETWORK))
    with contextlib.suppress(InputError):
        load_backbone(BackboneSource(weights=path))


def read_archive(path: Path) -> None:
    archive = open_archive(path, val_labels=path.with_name("labels.txt"), classes=None)
    for index in range(len(archive)):
        archive.key(index)
        archive.read(index)
    archive.close()


def read_labels(path: Path) -> None:
    open_archive(path.with_name("val.tar"), val_labels=path, classes=("a", "b")).close()
    read_classes(path)


def read_cached_index(path: Path) -> None:
    """The index of the folder beside it, as if it were in the cache."""
    folder = path.with_name("images")
    shutil.copy(path, cache_file(folder))
    load_index(folder)
    open_folder(folder).close()


def read_table(path: Path) -> None:
    MetricLoggers(RunFolder(path.parents[1]), RunOptions(log=("csv",)), first_step=5).close()


def read_listed(path: Path) -> None:
    listed_images(open_source(path.with_name("images")), path)


def read_form(path: Path) -> None:
    """What mvssl-convert reads, from a file, or a folder of its own."""
    look = look_at(path.parent)
    form = None if look is None or not look.files else find_form(look)
    if look is None or form is None:
        return
    for source in open_form(form, look, Request()).splits.values():
        for index in range(min(len(source), 12)):
            source.key(index)
            with contextlib.suppress(OSError):
                source.read(index)
        source.close()


def make_forms(root: Path) -> dict[str, tuple[Path, Read]]:
    """A file of each form that is read without conversion before, alone in its folder."""
    images = items()
    found: dict[str, tuple[Path, Read]] = {}
    for name in ("a.zip", "wds.tar", "a.parquet", "a.arrow", "state.json", "groups.h5", "array.h5", "data.mdb"):
        (root / name).mkdir(parents=True)
        found[name] = (root / name / name, read_form)
    with zipfile.ZipFile(root / "a.zip/a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for item in images:
            archive.writestr(f"{item.label}/{item.name}", item.data)
    with tarfile.open(root / "wds.tar/wds.tar", "w") as tar:
        for n, item in enumerate(images):
            for member, data in ((item.name, item.data), (f"{item.name[:3]}.cls", str(n % 3).encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    table = pa.table({"image": [i.data for i in images], "label": [n % 3 for n in range(len(images))]})
    pq.write_table(table, root / "a.parquet/a.parquet", row_group_size=4, compression="zstd")
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(root / "a.arrow/a.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema, options=options) as out,
    ):
        out.write_table(table)
    with pa.OSFile(str(root / "state.json/b.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    (root / "state.json/state.json").write_text('{"_data_files": [{"filename": "b.arrow"}], "_split": null}')
    with h5py.File(root / "groups.h5/groups.h5", "w") as file, h5py.File(root / "array.h5/array.h5", "w") as other:
        for item in images:
            file[f"{item.label}/{item.name}"] = np.frombuffer(item.data, np.uint8)
        other["images"], other["labels"] = np.zeros((5, 6, 7, 3), np.uint8), np.arange(5)
    with lmdb.open(str(root / "data.mdb"), map_size=1 << 24) as environment, environment.begin(write=True) as held:
        for n, item in enumerate(images):
            held.put(f"{item.label}/{item.name}".encode(), item.data if n % 2 else pickle.dumps((item.data, n % 3)))
    return found


def make_files(root: Path) -> dict[str, tuple[Path, Read]]:
    """A file of each kind, and how it is read; files beside it belong to it."""
    run = Path(shutil.copytree(BEFORE / "whole", root / "run", symlinks=True))
    (run / "summary.json").write_text(
        json.dumps(
            {
                "step": 9,
                "total_steps": 9,
                "stopped_by": None,
                "images_per_second": 5.0,
                "data_wait": 0.1,
                "bottleneck": "none",
                "bad_images": {"a": "b"},
            }
        )
    )
    (run / "csv").mkdir()
    (run / "csv/train.csv").write_text("step,loss\n1,2.0\n2,3.0\n")
    images = root / "images"
    for number in range(6):
        folder = images / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (number, 0, 0)).save(folder / f"{number}.png")
    recipe = to_dict(mvssl.recipes.demo())
    (root / "recipe.json").write_text(json.dumps(recipe))
    view = "task = 'b', size = 32, is_target = true"
    (root / "recipe.toml").write_text(
        f"base = 'demo'\nepochs = 3\nviews = [{{name = 'a', {view}}}, {{name = 'b', {view}}}]\n[optimizer]\n"
        "base_lr = 0.3\nwarmup_epochs = 1\n[evaluation]\nk = [3, 5]\n"
    )
    convert(Convert(src=images, dst=root / "shards"))
    shutil.copytree(BEFORE / "shards", root / "old")
    (root / "a.beton").write_bytes(gzip.decompress((BEFORE / "beton/images.beton.gz").read_bytes()))
    state = ShardState(shard=None, rows=np.zeros(0, INDEX_DTYPE), keys=[], bad=[("a", "b")], warned=[])
    state.save(root / "part.npz")
    DataRecord.of(open_source(images)).save(root / "data.npz")
    index = open_folder(images, use_cache=False)._index
    os.utime(images / "a", (1, 1))
    save_index(images, type(index)(**{**vars(index), "watched_mtime": np.zeros(3, np.int64)}))
    shutil.copy(cache_file(images), root / "index.npz")
    work = root / "work/.convert"
    work.mkdir(parents=True)
    (work / "plan.json").write_text(json.dumps({"images": 6, "source": "a", "max_size": None}))
    store = open_store(root / "store", rows=6, width=4, dtype="float32", identity={"network": "a"})
    store.write(np.arange(6), np.ones((6, 4), np.float32), list("abcdef"))
    store.save()
    tensors = dict(build_backbone(mvssl.Backbone(name=NETWORK)).state_dict())
    (root / "w.safetensors").write_bytes(save(tensors, metadata={"architecture": NETWORK}))
    held = {"online_model": {f"module.backbone.{name}": tensor for name, tensor in tensors.items()}, "epoch": 3}
    torch.save({**held, "target_model": held["online_model"]}, root / "w.pth")
    torch.save(held, root / "w.pt", _use_new_zipfile_serialization=False)
    pixels = (images / "a/0.png").read_bytes()
    for name, inner in (("val.tar", None), ("train.tar", "n1.tar")):
        content = BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for member in ("a" * 120 + ".png", "b.png"):
                info = tarfile.TarInfo(member)
                info.size = len(pixels)
                archive.addfile(info, BytesIO(pixels))
        (root / name).write_bytes(content.getvalue())
        if inner is not None:
            with tarfile.open(root / name, "w") as archive:
                info = tarfile.TarInfo(inner)
                info.size = len(content.getvalue())
                archive.addfile(info, BytesIO(content.getvalue()))
    (root / "labels.txt").write_text("a" * 120 + ".png a\nb.png b\n")
    (root / "list.txt").write_text("images/a/0.png a\nimages/b/1.png b\n")
    (root / "list.csv").write_text('path,label\nimages/a/0.png,"a"\nimages/b/1.png,b\n')
    (root / "listed.txt").write_text("0.png\n1.png\n")
    saved = run / "checkpoints/step-00000009"
    return {
        **make_forms(root / "forms"),
        "recipe.json": (root / "recipe.json", mvssl.load_recipe),
        "recipe.toml": (root / "recipe.toml", mvssl.load_recipe),
        "views of a recipe": (root / "recipe.json", view_sheet._read_views),
        "checkpoint.json": (saved / "checkpoint.json", read_checkpoint),
        "state.pt": (saved / "state.pt", read_checkpoint),
        **{name: (run / name, read_run) for name in ("config.json", "metrics.jsonl", "throughput.jsonl")},
        **{name: (run / name, read_run) for name in ("environment.json", "summary.json", "eval/knn-online.json")},
        "csv": (run / "csv/train.csv", read_table),
        "data.npz": (root / "data.npz", read_record),
        "index.npz": (root / "index.npz", read_cached_index),
        "part.npz": (root / "part.npz", ShardState.load),
        "plan.json": (work / "plan.json", lambda path: Destination(path.parents[1])._stored_plan()),
        "manifest.json": (root / "shards/manifest.json", lambda path: read_all(path.parent)),
        **{name: (root / "shards" / name, read_shards) for name in ("index.npy", "keys.npy", "checksums.npy")},
        "shard": (root / "shards/shard-000000.tar", lambda path: read_all(path.parent)),
        "old manifest": (root / "old/manifest.json", lambda path: read_all(path.parent)),
        "beton": (root / "a.beton", read_all),
        **{f"store {name}": (root / "store" / name, read_store) for name in os.listdir(root / "store")},
        **{name: (root / name, read_weights) for name in ("w.safetensors", "w.pth", "w.pt")},
        **{name: (root / name, read_archive) for name in ("train.tar", "val.tar")},
        "labels": (root / "labels.txt", read_labels),
        "list": (root / "list.txt", read_all),
        "list.csv": (root / "list.csv", read_all),
        "label list": (root / "listed.txt", read_listed),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Read]]]:
    root = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        (root / "cache/mvssl").mkdir(parents=True)
        yield make_files(root)


class TooSlow(BaseException):
    """A file holds a reader for too long."""


def verdict(read: Read, path: Path) -> str:
    """The sentence with which a file is refused; "" if it is read."""

    def stop(*_: object) -> None:
        raise TooSlow(f"{path} holds its reader for more than {MOST_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        read(path)
    except (InputError, OSError) as error:
        return str(error)
    finally:
        signal.alarm(0)
    return ""


KINDS = (
    *("recipe.json", "recipe.toml", "views of a recipe", "checkpoint.json", "state.pt", "config.json", "metrics.jsonl"),
    *("throughput.jsonl", "environment.json", "summary.json", "eval/knn-online.json", "csv", "data.npz", "index.npz"),
    *("part.npz", "plan.json", "manifest.json", "index.npy", "keys.npy", "checksums.npy", "shard", "old manifest"),
    *("beton", "store identity.json", "store features.npy", "store state.npy", "store checks.npy", "w.safetensors"),
    *("a.zip", "wds.tar", "a.parquet", "a.arrow", "state.json", "groups.h5", "array.h5", "data.mdb"),
    *("w.pth", "w.pt", "train.tar", "val.tar", "labels", "list", "list.csv", "label list"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_every_file_is_read_or_refused_in_a_sentence(kind: str, files: dict[str, tuple[Path, Read]]) -> None:
    path, read = files[kind]
    beside = {one: one.read_bytes() for one in path.parent.iterdir() if one.is_file() and one.stat().st_size < 1 << 20}
    content = path.read_bytes()
    large = kind == "beton"
    assert verdict(read, path) == "", "the file itself is read"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=EXAMPLES or (8 if large else 30),
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32 - 1))
    def try_one(seed: int) -> None:
        try:
            path.write_bytes(mutated(content, seed))
            said = verdict(read, path)
            assert "\n" not in said
            assert len(said) < 6000
        finally:
            for one, kept in {**beside, path: content}.items():
                one.write_bytes(kept)

    try_one()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MOST_MEMORY


def test_all_kinds_are_tried(files: dict[str, tuple[Path, Read]]) -> None:
    assert set(KINDS) == files.keys()
