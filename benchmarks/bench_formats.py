"""Conversion of each form that images come in against the folder of the same images.

python -m benchmarks.bench_formats [--images 2000] [--side 160] [--workers 2] [--forms NAME ...] [--out FILE]

Every form is written from the same JPEGs, or for the forms of raw pixels from the same 32 x 32 pixels. Each conversion
runs in a process of its own, from opening SRC to the last byte, with all libraries imported before; the forms are
interleaved.
"""

from __future__ import annotations

import io
import json
import pickle
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness.command import check_positive, command_of, finish
from benchmarks.harness.results import measured_by, write_result
from benchmarks.harness.trials import say
from pipelines.runtime import InputError, parse_arguments, run_cli
from pipelines.storage.forms.wire import masked_crc

PROG = "python -m benchmarks.bench_formats"
SMALL = 32  # pixels of a side of the raw forms
_CLASSES = 10
_CONVERT = (  # VmHWM, because the peak of getrusage is also that of the parent
    "import json, sys, time\n"
    "import h5py, lmdb, pyarrow.compute, pyarrow.parquet\n"
    "from pathlib import Path\n"
    "from pipelines.conversion.command import Convert, convert\n"
    "started, used = time.perf_counter(), time.process_time()\n"
    "convert(Convert(src=Path(sys.argv[1]), dst=Path(sys.argv[2]), workers=int(sys.argv[3])))\n"
    "seconds, cpu = time.perf_counter() - started, time.process_time() - used\n"
    "peak = int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024\n"
    "print(json.dumps({'seconds': seconds, 'cpu_seconds': cpu, 'peak_mib': peak}))\n"
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Convert every form and compare it with the folder.

    Attributes:
        images: of each form.
        side: pixels of the JPEGs.
        workers: threads of a conversion.
        repeats: trials of each form.
        forms: names; none for all.
        out: JSON file.
    """

    images: int = 2000
    side: int = 160
    workers: int = 2
    repeats: int = 3
    forms: tuple[str, ...] = ()
    out: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "images", "side", "workers", "repeats")
        unknown = set(self.forms) - FORMS.keys()
        if unknown:
            raise InputError(f"forms has {min(unknown)!r} but must be of {', '.join(FORMS)}: choose some of these.")


@dataclass(frozen=True)
class Images:
    """JPEGs, pixels uint8 [N, 32, 32, 3], and labels."""

    jpegs: list[bytes]
    pixels: np.ndarray
    labels: list[int]

    def names(self) -> list[str]:
        return [f"c{label}/{n:07d}" for n, label in enumerate(self.labels)]


def draw(count: int, side: int) -> Images:
    """Smooth images with some noise, whose JPEGs have the size of photographs'."""
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 16 + 2, side // 16 + 2, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        jpegs.append(file.getvalue())
    pixels = rng.integers(0, 256, (count, SMALL, SMALL, 3), dtype=np.uint8)
    return Images(jpegs, pixels, [n % _CLASSES for n in range(count)])


def write_folder(root: Path, images: Images) -> Path:
    for name, data in zip(images.names(), images.jpegs, strict=True):
        path = root / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_small_folder(root: Path, images: Images) -> Path:
    for name, pixels in zip(images.names(), images.pixels, strict=True):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)
    return root


def write_zip(root: Path, images: Images) -> Path:
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
        for name, data in zip(images.names(), images.jpegs, strict=True):
            archive.writestr(f"{name}.jpg", data)
    return root.with_suffix(".zip")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_tar(root: Path, images: Images, mode: str = "w") -> Path:
    path = root.with_suffix(".tar" if mode == "w" else ".tar.gz")
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in zip(images.names(), images.jpegs, strict=True):
            _add(archive, f"{name}.jpg", data)
    return path


def write_webdataset(root: Path, images: Images) -> Path:
    with tarfile.open(root.with_suffix(".tar"), "w") as archive:
        for n, (data, label) in enumerate(zip(images.jpegs, images.labels, strict=True)):
            _add(archive, f"{n:07d}.jpg", data)
            _add(archive, f"{n:07d}.cls", str(label).encode())
    return root.with_suffix(".tar")


def _table(images: Images) -> Any:
    import pyarrow as pa

    return pa.table({"image": pa.array([{"bytes": data} for data in images.jpegs]), "label": images.labels})


def write_parquet(root: Path, images: Images) -> Path:
    import pyarrow.parquet as pq

    pq.write_table(_table(images), root.with_suffix(".parquet"), row_group_size=100)
    return root.with_suffix(".parquet")


def write_arrow(root: Path, images: Images) -> Path:
    import pyarrow as pa

    table = _table(images)
    path = root.with_suffix(".arrow")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    return path


def write_hdf5(root: Path, images: Images) -> Path:
    import h5py

    with h5py.File(root.with_suffix(".h5"), "w") as file:
        for name, data in zip(images.names(), images.jpegs, strict=True):
            file.create_dataset(name, data=np.frombuffer(data, np.uint8))
    return root.with_suffix(".h5")


def write_lmdb(root: Path, images: Images) -> Path:
    import lmdb

    size = 2 * sum(map(len, images.jpegs)) + (1 << 26)
    with lmdb.open(str(root), map_size=size) as environment, environment.begin(write=True) as transaction:
        for name, data in zip(images.names(), images.jpegs, strict=True):
            transaction.put(name.encode(), data)
    return root


def write_tfrecord(root: Path, images: Images) -> Path:
    path = root.with_suffix(".tfrecord")
    with path.open("wb") as file:
        for data, label in zip(images.jpegs, images.labels, strict=True):
            content = _field(1, _entry("image", _field(1, _field(1, data))) + _entry("label", _int_list(label)))
            length = struct.pack("<Q", len(content))
            file.write(length + struct.pack("<I", masked_crc(length)) + content)
            file.write(struct.pack("<I", masked_crc(content)))
    return path


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _int_list(value: int) -> bytes:
    return _field(3, _field(1, _varint(value)))


def _entry(name: str, feature: bytes) -> bytes:
    return _field(1, _field(1, name.encode()) + _field(2, feature))


def write_cifar(root: Path, images: Images) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    data = images.pixels.transpose(0, 3, 1, 2).reshape(len(images.pixels), -1)
    for number, start in enumerate(range(0, len(data), 9999)):  # another size than the published one
        part = slice(start, start + 9999)
        content = {b"data": data[part], b"labels": images.labels[part]}
        (folder / f"data_batch_{number + 1}").write_bytes(pickle.dumps(content, 2))
    return folder


def write_idx(root: Path, images: Images) -> Path:
    root.mkdir()
    shape = images.pixels.shape
    (root / "train-images-idx4-ubyte").write_bytes(
        bytes([0, 0, 8, 4]) + struct.pack(">4I", *shape) + images.pixels.tobytes()
    )
    (root / "train-labels-idx1-ubyte").write_bytes(
        bytes([0, 0, 8, 1]) + struct.pack(">I", len(images.labels)) + bytes(images.labels)
    )
    return root


FORMS: dict[str, Callable[[Path, Images], Path]] = {
    "folder": write_folder,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "webdataset": write_webdataset,
    "tar": write_tar,
    "tar.gz": lambda root, images: write_tar(root, images, "w:gz"),
    "zip": write_zip,
    "hdf5": write_hdf5,
    "lmdb": write_lmdb,
    "tfrecord": write_tfrecord,
    "small folder": write_small_folder,
    "cifar": write_cifar,
    "idx": write_idx,
}
PIXELS = ("small folder", "cifar", "idx")
"""Forms of 32 x 32 pixels, which are compared with a folder of PNGs."""


def convert(source: Path, workers: int) -> dict[str, float]:
    """Seconds and peak memory (MiB) of one conversion in a process of its own."""
    with tempfile.TemporaryDirectory(dir=source.parent) as dst:
        words = [sys.executable, "-c", _CONVERT, str(source), dst, str(workers)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise InputError(f"A conversion of {source.name} failed with exit code {done.returncode}: {last}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values."""
    names = arguments.forms or tuple(FORMS)
    trials: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = draw(arguments.images, arguments.side)
        sources = {}
        for number, name in enumerate(names):
            (Path(folder) / str(number)).mkdir()
            sources[name] = FORMS[name](Path(folder) / str(number) / "images", images)
        del images
        for turn in range(arguments.repeats):
            for name in names:
                trials[name].append(convert(sources[name], arguments.workers))
                say(f"{name}: {arguments.images / trials[name][-1]['seconds']:.0f} images/s")
            last = turn == arguments.repeats - 1
            result = {
                "benchmark": "formats",
                "device": "cpu",
                "images": arguments.images,
                "side": arguments.side,
                "workers": arguments.workers,
                "repeats": turn + 1,
                "partial": not last,
                "forms": summary(trials, arguments.images),
                **measured_by(command),
            }
            write_result(arguments.out, result)
    return result


def summary(trials: dict[str, list[dict[str, float]]], images: int) -> dict[str, dict[str, float | None]]:
    """For each form the median images/s, their range, times the folder's in its turn, CPU-ms an image, peak MiB."""
    rows: dict[str, dict[str, float | None]] = {}
    for name, own in trials.items():
        rates = [images / one["seconds"] for one in own]
        base = trials.get("small folder" if name in PIXELS else "folder")
        ratios = [b["seconds"] / one["seconds"] for one, b in zip(own, base, strict=True)] if base else []
        rows[name] = {
            "images_per_second": statistics.median(rates),
            "least": min(rates),
            "most": max(rates),
            "times_folder": statistics.median(ratios) if ratios else None,
            "cpu_ms": statistics.median(1000 * one["cpu_seconds"] / images for one in own),
            "peak_mib": max(one["peak_mib"] for one in own),
        }
    return rows


def body(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = parse_arguments(Arguments, prog=PROG, args=list(words))
    return finish(measure(arguments, command=command_of(PROG, words)), arguments.out)


if __name__ == "__main__":
    run_cli(lambda: body(sys.argv[1:]))
