"""FFCV itself, in a process of its own (it can hang): writes .beton files, or reads one.

python ffcv_programs.py write IMAGES.npz FOLDER
python ffcv_programs.py read FILE.beton OUT.npz DECODER
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TIMEOUT = 120  # seconds; numba compiles the pipelines
MODES = ("jpg", "raw", "proportion", "smart")

needs_ffcv = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed: run tools/install_ffcv.sh"
)


def ffcv_write(images: list[np.ndarray], labels: list[int], folder: Path) -> None:
    """Let FFCV's own writer write `images`, uint8 [H, W, 3] each, as MODE.beton for all modes and as nolabel.beton."""
    arrays: dict[str, Any] = {f"image{n}": image for n, image in enumerate(images)}
    np.savez(folder / "images.npz", labels=labels, **arrays)
    _run("write", folder / "images.npz", folder)


def ffcv_read(path: Path, *, decoder: str) -> tuple[np.ndarray, np.ndarray]:
    """What FFCV's own loader gives in sequential order, the same with and without the system's cache.

    `decoder` is "simple" (images of one size) or "center" (32 x 32 pixels from the middle).

    Returns:
        uint8 [N, H, W, 3] and int64 [N].
    """
    out = path.with_name("read.npz")
    _run("read", path, out, decoder)
    with np.load(out) as data:
        return data["images"], data["labels"]


def _run(*arguments: object) -> None:
    command = [sys.executable, "-W", "ignore", __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr


class Samples:
    """What FFCV's writer takes: (image, label) by index."""

    def __init__(self, path: str, *, labelled: bool) -> None:
        with np.load(path) as data:
            self._labels = data["labels"].tolist()
            self._images = [data[f"image{n}"] for n in range(len(self._labels))]
        self._labelled = labelled

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (self._images[index], self._labels[index], 0.5) if self._labelled else (self._images[index],)


def _write(source: str, folder: str) -> None:
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    np.random.seed(0)  # decides which images "proportion" compresses
    for mode in MODES:
        fields = {"image": RGBImageField(write_mode=mode, jpeg_quality=95), "label": IntField(), "weight": FloatField()}
        writer = DatasetWriter(f"{folder}/{mode}.beton", fields, num_workers=1)
        writer.from_indexed_dataset(Samples(source, labelled=True))
    writer = DatasetWriter(f"{folder}/nolabel.beton", {"image": RGBImageField(write_mode="jpg")}, num_workers=1)
    writer.from_indexed_dataset(Samples(source, labelled=False))


def _read(path: str, out: str, decoder: str) -> None:
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    found = []
    for os_cache in (True, False):
        decode = SimpleRGBImageDecoder() if decoder == "simple" else CenterCropRGBImageDecoder((32, 32), 1.0)
        loader = Loader(
            path,
            batch_size=4,
            num_workers=1,
            order=OrderOption.SEQUENTIAL,
            os_cache=os_cache,
            drop_last=False,
            pipelines={"image": [decode], "label": [IntDecoder()]},
        )
        batches = [(images.copy(), labels.copy()) for images, labels in loader]  # valid until the next batch only
        found.append([np.concatenate(arrays) for arrays in zip(*batches, strict=True)])
    (images, labels), again = found
    assert np.array_equal(images, again[0])
    assert np.array_equal(labels, again[1])
    np.savez(out, images=images, labels=labels.reshape(-1))


if __name__ == "__main__":
    if sys.argv[1] == "write":
        _write(*sys.argv[2:])
    else:
        _read(*sys.argv[2:])
