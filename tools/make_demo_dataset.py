"""Creates a small synthetic labelled data set: OUT/train/<class>/*.jpg and OUT/val/<class>/*.jpg.

Images have many sizes; classes differ only in shape and texture (see `tools.demo_images`). The same arguments give the
same bytes with the same versions of numpy and Pillow. About 5 ms per image on one core.

    python -m tools.make_demo_dataset demo_out/images --num-train 2304 --num-val 480
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from pipelines.names import visible
from pipelines.runtime import InputError, invalid, parse_arguments, run_cli
from tools.demo_images import CLASSES, class_name, render_image

SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class DemoDataset:
    """Create a small labelled JPEG data set whose classes differ in shape and texture, not in colour.

    Attributes:
        out: output folder; an earlier demo data set there is replaced, other files are an error.
        num_train: images of the train split, evenly distributed over the classes.
        num_val: images of the val split.
        classes: number of classes, 2 to 8.
        seed: another seed gives other images of the same classes.
    """

    out: Annotated[Path, tyro.conf.Positional]
    num_train: int = 2304
    num_val: int = 480
    classes: int = len(CLASSES)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= len(CLASSES):
            raise invalid("classes", self.classes, f"between 2 and {len(CLASSES)}", "choose a number in between")
        for name in ("num_train", "num_val"):
            if getattr(self, name) < self.classes:
                raise invalid(name, getattr(self, name), f"at least the {self.classes} classes", "create more images")
        if not 0 <= self.seed < 2**32:
            raise invalid("seed", self.seed, "between 0 and 2**32 - 1", "give another seed")


def make_demo_dataset(config: DemoDataset) -> dict[str, int]:
    """Render and write the images; returns the number of images of each split.

    Image i of a split has class i modulo the number of classes and depends on (seed, split, i) only, so a larger data
    set begins with the smaller one.

    Raises:
        InputError: the folder holds other files.
    """
    _clear(config.out)
    for kind in range(config.classes):
        for split in SPLITS:
            (config.out / split / class_name(kind)).mkdir(parents=True, exist_ok=True)
    counts = dict(zip(SPLITS, (config.num_train, config.num_val), strict=True))
    for position, (split, count) in enumerate(counts.items()):
        for index in range(count):
            rng = np.random.default_rng([config.seed, position, index])
            kind = index % config.classes
            image = Image.fromarray(render_image(kind, rng))
            path = config.out / split / class_name(kind) / f"{index:05d}.jpg"
            image.save(path, quality=int(rng.integers(80, 96)), subsampling=int(rng.choice([0, 2])))
    return counts


def _clear(out: Path) -> None:
    """Remove an earlier data set from `out`, unless it holds other files."""
    foreign = [entry.name for entry in out.iterdir() if entry.name not in SPLITS] if out.is_dir() else []
    ours = {class_name(kind) for kind in range(len(CLASSES))}
    for split in SPLITS:
        if (out / split).is_dir():
            foreign += [f"{split}/{entry.name}" for entry in (out / split).iterdir() if entry.name not in ours]
    if foreign:
        raise InputError(
            f"out is {out} but holds {sorted(foreign)[0]}, which is not part of a demo data set: choose a new folder."
        )
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)


def body() -> None:
    """Parse the arguments and create the data set."""
    config = parse_arguments(DemoDataset, description=DemoDataset.__doc__)
    start = time.perf_counter()
    counts = make_demo_dataset(config)
    images = " and ".join(f"{count:,} {split}" for split, count in counts.items())
    took = time.perf_counter() - start
    print(visible(f"Created {images} images of {config.classes} classes in {took:.0f} s: {config.out}"))


if __name__ == "__main__":
    run_cli(body)
