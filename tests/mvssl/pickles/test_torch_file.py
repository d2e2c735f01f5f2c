"""Files that torch.save wrote elsewhere: tensors are those that were saved, and nothing in a file is run."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import functools
import io
import os
import pathlib
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mvssl.weights.load import BackboneSource, load_backbone
from mvssl.weights.read import read_weights
from pipelines.runtime import InputError
from tests.samples.checkpoint_samples import random_backbone, release


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    width: int = 3
    inner: Any = None


class Attributes(dict[str, Any]):
    """As the configurations of many trainers."""


class Runs:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Network(nn.Module):
    """Linear layers, a hidden and a saved buffer, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.register_buffer("saved", torch.arange(3))
        self.register_buffer("hidden", torch.ones(1), persistent=False)
        self.function = functools.partial(print, "x")


OBJECTS: dict[str, Any] = {
    "namespace": argparse.Namespace(arch="resnet18"),
    "path": pathlib.PosixPath("/a/b"),
    "partial": functools.partial(int, base=2),
    "function": os.path.join,
    "class": Settings,
    "enum": Colour.RED,
    "dataclass": Settings(inner=argparse.Namespace(x=[1])),
    "numpy": (np.float32(2), np.dtype("f4"), np.random.default_rng(0)),
    "containers": (collections.deque([1]), collections.defaultdict(list, a=[1]), collections.Counter("ab"), {1}),
    "values": (3 + 4j, slice(1, 2), b"abc", bytearray(b"abc"), 10**300, None, True, torch.float16, torch.device("cpu")),
    "generator": torch.Generator().get_state(),
    "sparse": torch.eye(3).to_sparse(),
}
TENSORS = {
    "float32": torch.randn(3, 4),
    "float16": torch.randn(3).half(),
    "bfloat16": torch.randn(3).bfloat16(),
    "float8": torch.randn(3).to(torch.float8_e4m3fn),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "int64": torch.arange(5),
    "bool": torch.tensor([True, False]),
    "complex": torch.randn(2, dtype=torch.complex64),
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 3),
    "transposed slice": torch.arange(12.0).reshape(3, 4).t()[1:, ::2],
    "parameter": nn.Parameter(torch.randn(2)),
}


def saved(path: Path, content: Any, *, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["zip", "before 1.6", "pickle"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_are_read_among_any_objects(tmp_path: Path, form: str, protocol: int) -> None:
    content = {"objects": OBJECTS, "state_dict": TENSORS, **OBJECTS}
    path = tmp_path / "file.pth"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        saved(path, content, zipped=form == "zip", protocol=protocol)
    found = read_weights(path)
    assert set(found["state_dict"]) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = found["state_dict"][name]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.detach().tolist() == tensor.detach().tolist(), name
    assert found["namespace"] == {"arch": "resnet18"}


@pytest.mark.parametrize("zipped", [True, False])
def test_views_of_one_storage_and_files_without_checksums(tmp_path: Path, zipped: bool) -> None:
    whole = torch.arange(10.0)
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "f.pt", {"a": whole[2:5], "b": whole[7:]}, zipped=zipped)
    finally:
        torch.serialization.set_crc32_options(checked)
    assert {name: tensor.tolist() for name, tensor in read_weights(path).items()} == {"a": [2, 3, 4], "b": [7, 8, 9]}


@pytest.fixture
def their_module() -> Iterator[types.ModuleType]:
    """A module `optim` that exists only while the file is written."""
    module = types.ModuleType("optim")
    code = "class LARS:\n    pass\ndef exclude_bias_and_norm(p):\n    return p.ndim == 1\n"
    exec(code, module.__dict__)
    sys.modules["optim"] = module
    yield module
    sys.modules.pop("optim", None)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_lars_checkpoint_of_the_reference_implementation(
    tmp_path: Path, their_module: types.ModuleType, zipped: bool
) -> None:
    online, target = random_backbone("resnet18", seed=1), random_backbone("resnet18", seed=2)
    content = release(online.state_dict(), target.state_dict(), {}, module=True)
    content["optimizer"]["param_groups"][0] |= {
        "weight_decay_filter": their_module.exclude_bias_and_norm,
        "lars_adaptation_filter": their_module.exclude_bias_and_norm,
    }
    path = saved(tmp_path / "checkpoint.pth", content, zipped=zipped)
    del sys.modules["optim"]
    for network, model in (("online", online), ("target", target)):
        loaded = load_backbone(BackboneSource(weights=path, network=network))  # type: ignore[arg-type]
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.backbone.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_modules_are_their_state_dicts(tmp_path: Path, zipped: bool) -> None:
    network = Network()
    found = read_weights(saved(tmp_path / "whole.pt", {"model": network, "epoch": 3}, zipped=zipped))
    wanted = network.state_dict()
    assert set(found["model"]) == set(wanted)
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in wanted.items())
    bare = read_weights(saved(tmp_path / "bare.pt", nn.DataParallel(network), zipped=zipped))
    assert set(bare) == {f"module.{name}" for name in wanted}


def test_torchscript_and_objects_derived_from_dict(tmp_path: Path) -> None:
    model = random_backbone("resnet18", seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, torch.zeros(1, 3, 32, 32)).save(tmp_path / "script.pt")
    derived = saved(tmp_path / "derived.pt", Attributes(model=Attributes(model.state_dict())))
    arrays = tmp_path / "arrays.pkl"
    columns = {name: np.array(tensor.numpy(), order="F") for name, tensor in model.state_dict().items()}
    arrays.write_bytes(pickle.dumps(columns))
    big = tmp_path / "big.pkl"
    big.write_bytes(pickle.dumps({name: np.asarray(x, x.dtype.newbyteorder(">")) for name, x in columns.items()}))
    for path in (tmp_path / "script.pt", derived, arrays, big):
        tensors = load_backbone(BackboneSource(weights=path)).backbone.state_dict()
        assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


HOSTILE: dict[str, bytes] = {
    "reduce": b"cos\nmkdir\n(S'FOLDER'\ntR.",
    "inst": b"(S'FOLDER'\nios\nmkdir\n.",
    "obj": b"(cos\nmkdir\nS'FOLDER'\no.",
    "new object": b"\x80\x02cos\nmkdir\nX\x06\x00\x00\x00FOLDER\x85\x81.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x06FOLDER\x85R.",
    "getattr": b"c__builtin__\ngetattr\n(cos\npath\nS'FOLDER'\ntR(S'FOLDER'\ntR.",
    "build": b"}(dS'__setstate__'\ncos\nmkdir\nsS'FOLDER'\nb.",
    "codec": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x06\x00\x00\x00FOLDERtR.",
    "list in itself": b"\x80\x02]q\x00h\x00a.",
    "tuples in tuples": b"(" * 50_000 + b"t" * 50_000 + b".",
    "large memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "long text": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a.",
    "long bytes": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"a.",
    "empty stack": b"t.",
    "no end": b"((((",
    "number": b"I" + b"9" * 10_000 + b"\n.",
    "large storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu\x8a\x08" + (2**50).to_bytes(8, "little") + b"tQK\x00))\x89}tR.",
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_run_nothing_and_are_refused(
    name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pt"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", HOSTILE[name])
            archive.writestr("archive/data/0", b"1234")
    else:
        path.write_bytes(HOSTILE[name])
    with pytest.raises(InputError, match=r"file\.pt (cannot be read as|holds)"):
        read_weights(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]


def test_code_between_tensors_is_not_run(tmp_path: Path) -> None:
    done = tmp_path / "done"
    content = {
        "a": torch.ones(2),
        "evil": Runs(os.mkdir, str(done)),
        "worse": {"x": Runs(eval, f"open({str(done)!r}, 'w')")},
    }
    assert torch.equal(read_weights(saved(tmp_path / "file.pt", content))["a"], torch.ones(2))
    assert not done.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_files_cut_short_are_refused(tmp_path: Path, part: float, zipped: bool) -> None:
    whole = saved(tmp_path / "whole.pt", {"a": torch.randn(500), "b": torch.randn(50)}, zipped=zipped).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(InputError, match=r"cut\.pt cannot be read as a file of weights"):
        read_weights(tmp_path / "cut.pt")


def test_flipped_bits_and_tensors_beyond_their_storage_are_refused(tmp_path: Path) -> None:
    data = bytearray(saved(tmp_path / "a.pt", {"a": torch.zeros(10_000)}).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(InputError, match=r"Bad CRC-32"):
        read_weights(tmp_path / "a.pt")
    with zipfile.ZipFile(saved(tmp_path / "b.pt", {"a": torch.zeros(4)})) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    longer = next(name for name in members if name.endswith("data.pkl"))
    stated = b"K\x04\x85"  # the size (4,)
    assert members[longer].count(stated) == 1
    members[longer] = members[longer].replace(stated, b"K\x09\x85")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    (tmp_path / "b.pt").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match=r"b\.pt cannot be read"):
        read_weights(tmp_path / "b.pt")


def test_modules_that_contain_each_other_many_times_end(tmp_path: Path) -> None:
    inner: nn.Module = nn.Identity()
    for _ in range(40):  # 2 ** 40 names
        outer = nn.Module()
        outer.a = outer.b = inner
        inner = outer
    with pytest.raises(InputError, match="more than 100,000 modules"):
        read_weights(saved(tmp_path / "file.pt", inner))
    loop = nn.Module()
    loop.weight = nn.Parameter(torch.ones(2))
    loop._modules["again"] = loop
    assert list(read_weights(saved(tmp_path / "loop.pt", loop))) == ["weight"]
