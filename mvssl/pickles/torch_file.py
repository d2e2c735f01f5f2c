"""Reads the tensors of files that torch.save or pickle wrote, of any version, without running code from them.

Layout: torch/serialization.py. A zip archive holds the pickle ``data.pkl`` and each storage as ``data/KEY``; before
torch 1.6 a file is five pickles (magic number, version, byte order, content, keys) and then the storages.
"""

from __future__ import annotations

import io
import itertools
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from mvssl.pickles.safe_pickle import Global, Inert, hashable, unpickle
from pipelines.files import open_regular

_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file before torch 1.6
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.int8,  # the numbers of quantised tensors, which are skipped
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "QUInt4x2Storage": torch.uint8,
    "QUInt2x4Storage": torch.uint8,
}
_MOST_MODULES = 100_000  # of one network; a hostile file can name one module in exponentially many ways
_LONGEST_NAME = 10_000
_MOST_LEVELS = 100  # of modules in modules
_SMALL = 1 << 26  # bytes that a file may always unpack to
_CHUNK = 1 << 24


def read_torch_file(path: Path) -> Any:
    """Read a file's content.

    Returns:
        Plain values with tensors on the CPU. Objects of other classes are `Inert`, except that at the top and one level
        below a module is its state_dict, an object of a class derived from dict is a dict, and any other object with
        attributes is a dict of them.

    Raises:
        pickle.UnpicklingError: the file is damaged, or no such file.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        return parse_torch_file(file)


def parse_torch_file(file: IO[bytes]) -> Any:
    """Read the content of an open file; see `read_torch_file`."""
    try:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        content = _plain(_read_zip(file) if zipped else _read_legacy(file))
        return {k: _plain(v) for k, v in content.items()} if isinstance(content, Mapping) else content
    except (OSError, pickle.UnpicklingError):
        raise
    except Exception as error:  # a hostile file can cause any of them
        raise pickle.UnpicklingError(str(error) or type(error).__name__) from error


def _read_zip(file: IO[bytes]) -> Any:
    size = file.seek(0, io.SEEK_END)
    with closing(zipfile.ZipFile(file)) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > max(_SMALL, 2 * size):  # torch does not compress tensors
            raise zipfile.BadZipFile(f"it would unpack from {size:,} to {unpacked:,} bytes")
        names = sorted((name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"), key=len)
        if not names:
            raise zipfile.BadZipFile("it is a zip archive without data.pkl")
        for info in archive.infolist():
            if info.CRC == 0:  # torch.serialization.set_crc32_options(False): not computed, so zipfile must not compare
                del info.CRC
        root = names[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        big = order in archive.namelist() and archive.read(order).strip() == b"big"
        storages: dict[str, Tensor] = {}

        def storage(identity: Any) -> Any:
            if not _is_storage(identity):
                return Inert("persistent id", (identity,))
            _, kind, key, _, count, *_ = identity
            dtype = _storage_dtype(kind)
            if dtype is None:
                return Inert(kind.name)
            if key not in storages:
                name = f"{root}data/{key}"
                if count * dtype.itemsize > archive.getinfo(name).file_size:
                    raise EOFError(f"a storage has {count} numbers, more than its part of the file")
                with archive.open(name) as record:
                    storages[key] = _read_storage(record, dtype, count, big=big)
            return storages[key]

        return unpickle(io.BytesIO(archive.read(names[0])), known=_KNOWN, persistent=storage)


def _read_legacy(file: IO[bytes]) -> Any:
    """The content of a file before torch 1.6, or of a plain pickle."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    first = unpickle(file, known=_KNOWN, persistent=lambda identity: Inert("persistent id", (identity,)))
    if type(first) is not int or first != _MAGIC:
        return first
    storages: dict[str, Tensor] = {}

    def storage(identity: Any) -> Any:
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # a class, with its source code
        if not _is_storage(identity):
            return Inert("persistent id", (identity,))
        _, kind, key, _, count, *view = identity
        dtype = _storage_dtype(kind)
        if dtype is None:
            return Inert(kind.name)
        if key not in storages:
            if not 0 <= count * dtype.itemsize <= size:
                raise EOFError(f"a storage has {count} numbers, more than the file")
            storages[key] = torch.empty(count, dtype=dtype)  # filled below: the numbers follow the pickles
        if view and view[0] is not None:
            _, offset, length = view[0]
            return storages[key][offset : offset + length]
        return storages[key]

    version, about, content, keys = (unpickle(file, known=_KNOWN, persistent=storage) for _ in range(4))
    del version
    big = isinstance(about, dict) and about.get("little_endian") is False
    for key in keys:
        (count,) = struct.unpack(">q" if big else "<q", file.read(8))
        if key not in storages or count != storages[key].numel():
            raise EOFError("a storage has another length than its tensors")
        storages[key].copy_(_read_storage(file, storages[key].dtype, count, big=big))
    return content


def _is_storage(identity: Any) -> bool:
    return (
        isinstance(identity, tuple)
        and len(identity) >= 5
        and identity[0] == "storage"
        and isinstance(identity[1], Global)
        and type(identity[4]) is int
    )


def _storage_dtype(kind: Global) -> torch.dtype | None:
    """The dtype of a storage class such as torch.FloatStorage or torch.cuda.HalfStorage."""
    return _STORAGES.get(kind.name.rpartition(".")[2]) if kind.name.startswith("torch.") else None


def _read_storage(file: IO[bytes], dtype: torch.dtype, count: int, *, big: bool) -> Tensor:
    """The next `count` numbers of a file, [count], in this machine's byte order (little-endian)."""
    raw = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    view, filled = raw.numpy(), 0
    while filled < len(view):
        chunk = file.read(min(_CHUNK, len(view) - filled))
        if not chunk:
            raise EOFError("it ends in the middle of a tensor")
        view[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    if big:
        word = dtype.itemsize // (2 if dtype.is_complex else 1)
        raw = raw.view(-1, word).flip(1).reshape(-1)
    return raw.view(dtype)


# The functions by which tensors are pickled. Each takes what torch's function of that name takes.


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *more: Any) -> Any:
    if not isinstance(storage, Tensor):
        return storage
    tensor = storage.as_strided(size, stride, offset)  # checks its bounds
    lazy = more[2] if len(more) > 2 and isinstance(more[2], dict) else {}  # what torch has not applied to the numbers
    tensor = tensor.conj().resolve_conj() if lazy.get("conj") is True else tensor
    return -tensor if lazy.get("neg") is True else tensor


def _tensor_of_dtype(
    storage: Any, offset: int, size: Any, stride: Any, _gradient: Any, _hooks: Any, dtype: Any, *_: Any
) -> Any:
    if not isinstance(storage, Tensor) or not isinstance(dtype, Global) or dtype.name not in _DTYPES:
        return Inert("tensor of an unknown dtype")
    return storage.view(torch.uint8).view(_DTYPES[dtype.name]).as_strided(size, stride, offset)


def _first(data: Any, *_: Any) -> Any:
    return data


def _from_type(function: Any, _kind: Any, arguments: Any, *_: Any) -> Any:
    build = _KNOWN.get(function.name) if isinstance(function, Global) else None
    return Inert("tensor of another class", arguments) if build is None else build(*arguments)


def _from_array(array: Any, *_: Any) -> Any:
    tensor = _array(array)
    return Inert("numpy array") if tensor is None else tensor


def _storage_of_bytes(data: bytes) -> Any:
    return _read_legacy(io.BytesIO(data))


def _dict(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, Mapping) else items
    return {hashable(name): value for name, value in pairs}


def _set(elements: Any = ()) -> frozenset[Any]:
    return frozenset(map(hashable, elements))


def _encode(text: str, *_: Any) -> bytes:
    return text.encode("latin-1")  # bytes, as protocol 2 writes them


_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "builtins.frozenset": _set,
    "_codecs.encode": _encode,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _from_array,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.storage._load_from_bytes": _storage_of_bytes,
}


def _plain(value: Any) -> Any:
    """A numpy array as a tensor; a module, an object derived from dict, or one with attributes as a dict."""
    if not isinstance(value, Inert):
        if isinstance(value, Mapping) and any(isinstance(inner, Inert) for inner in value.values()):
            arrays = {name: _array(inner) for name, inner in value.items()}
            return {name: inner if arrays[name] is None else arrays[name] for name, inner in value.items()}
        return value
    array = _array(value)
    if array is not None:
        return array
    if _is_module(value):
        return _state_dict(value)
    return {**_as_dict(value.state), **dict(value.pairs)} or value


def _is_module(value: Any) -> bool:
    """Whether this is an nn.Module or a TorchScript module."""
    return (
        isinstance(value, Inert)
        and isinstance(value.state, dict)
        and ("_modules" in value.state or value.name.startswith("__torch__."))
    )


def _state_dict(module: Inert) -> dict[str, Tensor]:
    """Tensors of a pickled module by name, as in its state_dict."""
    tensors: dict[str, Tensor] = {}
    open_modules: list[tuple[str, Inert, frozenset[int]]] = [("", module, frozenset())]
    for count in itertools.count():
        if not open_modules:
            return tensors
        if count > _MOST_MODULES:
            raise pickle.UnpicklingError(f"a network has more than {_MOST_MODULES:,} modules")
        prefix, module, above = open_modules.pop()
        if len(above) > _MOST_LEVELS or len(prefix) > _LONGEST_NAME:
            raise pickle.UnpicklingError(f"a network has modules in modules, more than {_MOST_LEVELS} levels deep")
        own = below = state = module.state
        if "_modules" in state:
            hidden = state.get("_non_persistent_buffers_set") or ()
            own = {**_as_dict(state.get("_parameters")), **_as_dict(state.get("_buffers"))}
            own = {name: value for name, value in own.items() if name not in hidden}
            below = _as_dict(state["_modules"])
        tensors |= {f"{prefix}{name}": value for name, value in own.items() if isinstance(value, Tensor)}
        above |= {id(module)}
        inner = {f"{prefix}{name}.": value for name, value in below.items() if _is_module(value)}
        open_modules += [(name, value, above) for name, value in inner.items() if id(value) not in above]
    return tensors


def _as_dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else dict(value.pairs) if isinstance(value, Inert) else {}


def _array(value: Any) -> Tensor | None:
    """The tensor of a pickled numpy array; None for anything else, and for arrays of other values than numbers."""
    if not isinstance(value, Inert):
        return None
    if value.name.endswith("multiarray._reconstruct") and isinstance(value.state, tuple) and len(value.state) == 5:
        _, shape, dtype, fortran, data = value.state
    elif value.name.endswith("numeric._frombuffer") and len(value.args) == 4:
        data, dtype, shape, fortran = *value.args[:3], value.args[3] == "F"
    else:
        return None
    if not isinstance(dtype, Inert) or not dtype.args or not re.fullmatch(r"[fiub][1248]", str(dtype.args[0])):
        return None
    kind = np.dtype(str(dtype.args[0]))
    if isinstance(dtype.state, tuple) and len(dtype.state) > 1 and dtype.state[1] == ">":
        kind = kind.newbyteorder(">")
    raw = data.encode("latin-1") if isinstance(data, str) else data  # Python 2 wrote text
    array = np.frombuffer(raw, dtype=kind).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C"))
