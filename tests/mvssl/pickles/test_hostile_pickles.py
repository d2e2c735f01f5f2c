"""Pickles and files of torch.save that are to crash, fill the memory or run code."""

from __future__ import annotations

import io
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mvssl.pickles.torch_file import parse_torch_file, read_torch_file
from mvssl.weights.formats import find_network, guess_architecture
from mvssl.weights.load import BackboneSource, load_backbone
from mvssl.weights.read import read_weights
from pipelines.runtime import InputError

DEEP = b"(" + b")" + b"\x85" * 300_000  # a tuple in a tuple in a tuple: hashing it overflows the stack of C


def nested_modules(levels: int, name: str) -> bytes:
    """A module in a module in a module, each under a long name that the pickle has once."""
    word = b"X" + len(name).to_bytes(4, "little") + name.encode() + b"\x94"
    head = b"\x80\x04" + word + b"0"
    module = b"cmodels\nNet\n)\x81}\x8c\x08_modules}h\x00"
    return head + module * levels + b"N" + b"ssb" * levels + b"."


HOSTILE: dict[str, bytes] = {
    "a key of tuples": b"\x80\x04}" + DEEP + b"K\x01s.",
    "keys of tuples": b"\x80\x04}(" + DEEP + b"K\x01u.",
    "a dict of tuples": b"(" + DEEP + b"K\x01d.",
    "a set of tuples": b"\x80\x04\x8f(" + DEEP + b"\x90.",
    "a frozenset of tuples": b"\x80\x04(" + DEEP + b"\x91.",
    "an OrderedDict of tuples": b"\x80\x04ccollections\nOrderedDict\n]" + DEEP + b"K\x01\x86a\x85R.",
    "a set made of tuples": b"\x80\x04cbuiltins\nset\n](" + DEEP + b"e\x85R.",
    "modules in modules": nested_modules(50_000, "a" * 1000),
    "a memo of a billion": b"\x80\x04Nr\xff\xff\xff\xff.",
    "a text of a terabyte": b"\x80\x04\x8d" + (10**12).to_bytes(8, "little") + b"a.",
    "bytes of a gigabyte": b"\x80\x04B" + (1 << 30).to_bytes(4, "little") + b"a.",
    "a bytearray of a terabyte": b"\x80\x05\x96" + (10**12).to_bytes(8, "little") + b"a.",
    "a call that makes bytes": b"\x80\x04cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "a number of many digits": b"I" + b"9" * 100_000 + b"\n.",
    "lists in lists": b"]" * 200_000 + b"a" * 199_999 + b".",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_is_to_exhaust_something(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(HOSTILE[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as refused:
        load_backbone(BackboneSource(weights=path, arch="test_resnet"))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 3000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


def test_keys_that_are_tuples_are_read() -> None:
    content = {("a", ("b", 1)): 2, frozenset({(1, 2)}): {3, (4, 5)}}
    assert parse_torch_file(io.BytesIO(pickle.dumps(content))) == content


def changed(edit: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with other entries."""
    file, out = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, edit(entry.filename, old.read(entry)))
    return out.getvalue()


ARCHIVES = {
    "a storage beyond its bytes": lambda: changed(lambda name, data: data.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f")),
    "a negative storage": lambda: changed(lambda name, data: data.replace(b"M\xe8\x03", b"J\xff\xff\xff\xff")),
    "a storage of 256 MB in a quarter": lambda: changed(
        lambda name, data: bytes(1 << 28) if name.endswith("data/0") else data, zipfile.ZIP_DEFLATED
    ),
    "a pickle of 256 MB in a quarter": lambda: changed(
        lambda name, data: b"(" * (1 << 28) if name.endswith("data.pkl") else data, zipfile.ZIP_DEFLATED
    ),
    "cut short": lambda: changed(lambda name, data: data[:100]),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_that_lies(kind: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(ARCHIVES[kind]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((pickle.UnpicklingError, OSError)):
        read_torch_file(tmp_path / "w.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        (10**12).to_bytes(8, "little"),
        (20).to_bytes(8, "little") + b'{"a":' * 4,
        (60_000).to_bytes(8, "little") + b'{"a":' * 12_000,
        (64).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}',
        (66).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,9999999999]}}  ',
        (64).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'.ljust(64) + bytes(4),
        (64).to_bytes(8, "little") + b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + bytes(4),
        (64).to_bytes(8, "little") + b'{"__metadata__":{"architecture":5}}'.ljust(64),
        (64).to_bytes(8, "little") + b'{"__metadata__":{"architecture":"hf-hub:a/b"}}'.ljust(64),
    ],
)
def test_safetensors_that_lie(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(header)
    with pytest.raises(InputError, match=r"w\.safetensors") as refused:
        load_backbone(BackboneSource(weights=path))
    assert "\n" not in str(refused.value)


def test_tensors_of_other_shapes_and_types_than_their_names_promise(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for shape, dtype in (((), torch.float32), ((3,), torch.float32), ((64, 3, 7, 7), torch.complex64)):
        tensors = {name: torch.zeros(shape, dtype=dtype) for name in ("conv1.weight", "layer1.0.conv1.weight")}
        torch.save(tensors, path)
        with pytest.raises(InputError):
            load_backbone(BackboneSource(weights=path))
    for name in ("patch_embed.proj.weight", "cls_token", "pos_embed"):
        shapes = {"patch_embed.proj.weight": (192, 3, 16, 16), "cls_token": (1, 1, 192), "pos_embed": (1, 197, 192)}
        guess_architecture({key: torch.zeros(() if key == name else shape) for key, shape in shapes.items()})


@pytest.mark.timeout(60)  # minutes in quadratic time
def test_a_hundred_thousand_unknown_names(tmp_path: Path) -> None:
    content = {f"{number}{'x' * 500}.weight": torch.zeros(1) for number in range(30_000)}
    with pytest.raises(InputError, match="is no known checkpoint format"):
        find_network(content, where="here")
    (tmp_path / "w.pth").write_bytes(pickle.dumps({f"{number}": number for number in range(100_000)}))
    with pytest.raises(InputError, match="no known checkpoint format"):
        find_network(read_weights(tmp_path / "w.pth"), where="here")
