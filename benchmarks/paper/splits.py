"""Which images the comparison trains on, tunes by and tests on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.paper.cells import Setting
from pipelines.runtime import InputError


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Lists of labelled images, disjoint.

    Attributes:
        train: what is trained on, and the neighbours and the linear classifier's examples.
        tuning: what tuning is judged by.
        test: what results are measured on: val/, and all of train/ that neither of the others has.
    """

    train: Path
    tuning: Path
    test: Path


def write_splits(data: Path, out: Path, setting: Setting) -> Splits:
    """Write the lists that a setting uses into `out`.

    Raises:
        InputError: the data has not the folders, or too few classes or images.
    """
    train = data / "train"
    if not train.is_dir() or not (data / "val").is_dir():
        raise InputError(
            f"data is {str(data)!r} but must be a folder with train/ and val/, one folder a class in each: give the "
            "folder of tiny-imagenet-50."
        )
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())[: setting.classes]
    if len(classes) < setting.classes:
        raise InputError(f"{train} has {len(classes)} classes but the setting needs {setting.classes}: give more data.")
    lines: dict[str, list[str]] = {"train": [], "tuning": [], "test": []}
    needed = setting.train_images + setting.tuning_images
    for name in classes:
        images = sorted((train / name).iterdir())
        if len(images) < needed:
            raise InputError(f"{train / name} has {len(images)} images but the setting needs {needed}.")
        parts = {
            "train": images[: setting.train_images],
            "tuning": images[setting.train_images : needed],
            "test": [*images[needed:], *sorted((data / "val" / name).iterdir())],
        }
        for part, members in parts.items():
            lines[part] += [f"{image.resolve()}\t{name}" for image in members]
    out.mkdir(parents=True, exist_ok=True)
    for part, rows in lines.items():
        path, text = out / f"{part}.txt", "\n".join(rows) + "\n"
        if not path.exists() or path.read_text() != text:  # rewriting it would make the cached index stale
            path.write_text(text)
    return Splits(**{part: out / f"{part}.txt" for part in lines})
