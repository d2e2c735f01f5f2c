"""ImageNet as Kaggle has it, as a zip and unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from pipelines.storage import open_source
from tests.samples.convert_runs import Run
from tests.samples.form_samples import contents, encoded

WNIDS = ("n01440764", "n01443537", "n02105855")
TRAIN = {f"{w}/{w}_{n}.JPEG": encoded(10 * c + n) for c, w in enumerate(WNIDS) for n in range(2)}
VAL = {f"ILSVRC2012_val_{n:08d}": (encoded(100 + n), WNIDS[(5 - n) % 3]) for n in range(1, 5)}


def files(*, solution: bool = True, mapping: tuple[str, ...] = WNIDS) -> dict[str, bytes]:
    base = "ILSVRC/Data/CLS-LOC"
    made = {"ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml": b"<xml/>"}
    made |= {f"{base}/train/{name}": data for name, data in TRAIN.items()}
    made |= {f"{base}/val/{name}.JPEG": data for name, (data, _) in VAL.items()}
    made |= {f"{base}/test/ILSVRC2012_test_00000001.JPEG": encoded(99)}
    made["ILSVRC/ImageSets/CLS-LOC/val.txt"] = b"ILSVRC2012_val_00000001 1\n"
    made["LOC_synset_mapping.txt"] = "".join(f"{wnid} tench, Tinca tinca\n" for wnid in mapping).encode()
    if solution:
        lines = [f"{name},{wnid} 85 1 499 272 {wnid} 1 2 3 4" for name, (_, wnid) in reversed(VAL.items())]
        made["LOC_val_solution.csv"] = "\n".join(["ImageId,PredictionString", *lines, ""]).encode()
    return made


def make(root: Path, form: str, content: dict[str, bytes]) -> Path:
    if form == "zip":
        path = root / "imagenet-object-localization-challenge.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return path
    for name, data in content.items():
        path = root / "unpacked" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / "unpacked"


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_train_val_and_test(run: Run, tmp_path: Path, form: str) -> None:
    source = make(tmp_path, form, files())
    for number, path in enumerate([source, *([source / "ILSVRC"] if form == "folder" else [])]):
        outcome = run(path, tmp_path / f"d{number}")
        assert outcome.code == 0, outcome.err
        assert f"is ImageNet of Kaggle ({form}): train 6 images, val 4 images, test 1 image, 3 classes" in outcome.out
        dst = tmp_path / f"d{number}"
        assert contents(dst / "train") == {(data, name[:9]) for name, data in TRAIN.items()}
        assert contents(dst / "val") == set(VAL.values())
        assert contents(dst / "test") == {(encoded(99), "")}
        assert open_source(dst / "val").classes == WNIDS
        assert open_source(dst / "val").key(0).startswith("n01")


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_missing_and_other_tables(run: Run, tmp_path: Path, form: str) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    outcome = run(make(tmp_path / "a", form, files(solution=False)), tmp_path / "d")
    assert "val images without classes and no LOC_val_solution.csv" in outcome.err
    outcome = run(make(tmp_path / "b", form, files(mapping=WNIDS[:2])), tmp_path / "d")
    assert "has the class 'n02105855' in train, which is not in LOC_synset_mapping.txt" in outcome.err
    content = files()
    content["LOC_val_solution.csv"] = content["LOC_val_solution.csv"].rsplit(b"\n", 2)[0]
    outcome = run(make(tmp_path / "c", form, content), tmp_path / "d")
    assert "val/ILSVRC2012_val_00000001.JPEG without a class" in outcome.err
    assert not (tmp_path / "d").exists()
