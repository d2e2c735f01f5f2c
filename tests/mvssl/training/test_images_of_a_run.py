"""What a run says of its images: where it may write, which accuracy it computes, how other images differ on resume."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Literal

import pytest

import mvssl
from mvssl.config.recipe import Recipe
from mvssl.runs.data_record import DataRecord
from mvssl.runs.folder import RunFolder
from mvssl.training.loop import Loop
from mvssl.training.run import describe_images
from mvssl.training.shutdown import StopRequest
from pipelines.conversion.command import Convert, convert
from pipelines.runtime import InputError
from pipelines.storage import check_outside, open_source
from pipelines.storage.folder import forget_changed_index, load_index
from tests.samples.tiny_runs import metrics, train


@pytest.fixture
def own(images: Path, tmp_path: Path) -> Path:
    """A copy of the images, old enough for its index to be cached."""
    folder = tmp_path / "own"
    shutil.copytree(images, folder)
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (1_000_000_000, 1_000_000_000))
    return folder


@pytest.mark.parametrize("place", ["train", "train/run", "train/class_0/deep/run", "val/run", "link/run"])
def test_a_run_among_its_images_is_refused_before_anything_is_written(
    place: str, own: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    (own / "link").symlink_to("train")
    with pytest.raises(InputError, match=r"^out is .* must be outside the images in .*own/(train|val), or pictures"):
        train(tiny_recipe, own, own / place)
    assert not (own / place / "config.json").exists()


def test_places_beside_images_converted_data_and_lists_are_taken(own: Path, tmp_path: Path) -> None:
    convert(Convert(src=own / "train", dst=tmp_path / "shards"))
    (tmp_path / "list.txt").write_text("own/train/class_0/000.jpg\n")
    for data in (own / "train", tmp_path / "shards", tmp_path / "list.txt"):
        check_outside(own / "run", data, field="out")
    check_outside(tmp_path / "shards" / "run", tmp_path / "shards", field="out")
    check_outside(own / "train-run", own / "train", field="out")  # a common prefix of the names only


def test_one_class_has_no_accuracy(own: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    for name in ("class_1", "class_2"):
        shutil.rmtree(own / "train" / name)
    result = train(tiny_recipe, own / "train", tmp_path / "run")
    log = RunFolder(tmp_path / "run").log.read_text()
    assert result.knn == {}
    assert "12 images of 1 class (class_0 12)" in log
    assert "no kNN: all training images are of the one class 'class_0'" in log
    assert "top-1" not in log


def test_a_class_that_only_val_has_is_left_out_of_the_accuracy(
    finished: Path, own: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(own / "val" / "class_0", own / "val" / "another")
    train(tiny_recipe, own, tmp_path / "run")
    log = RunFolder(tmp_path / "run").log.read_text()
    assert "of 1 class that no training image has (another)" in log
    assert metrics(tmp_path / "run") == metrics(finished)


def test_val_of_other_classes_has_no_accuracy(own: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    for path in (own / "val").iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
    assert train(tiny_recipe, own, tmp_path / "run").knn == {}
    assert "no kNN: the validation images are of 3 classes that no train" in RunFolder(tmp_path / "run").log.read_text()


def test_images_are_described_by_classes_and_counts(own: Path) -> None:
    for number in range(3, 6):
        shutil.copytree(own / "train" / "class_0", own / "train" / f"class_{number}")
    (own / "train" / "class_5" / "000.jpg").unlink()
    assert describe_images(open_source(own / "train")) == "71 images of 6 classes (11 to 12 each)"
    shutil.copy(own / "train" / "class_0" / "000.jpg", own / "val" / "000.jpg")
    assert describe_images(open_source(own / "val")).endswith("; 1 without a label)")
    assert describe_images(open_source(own / "val" / "class_0")).endswith("images without labels")


def test_resuming_with_other_images_names_them(own: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny_recipe, own, out)

    def resume() -> str:
        with pytest.raises(InputError, match="started with other images") as refused:
            train(tiny_recipe, own, out, resume=True)
        return str(refused.value)

    one, two, three = (own / "train" / "class_0" / f"00{n}.jpg" for n in range(3))
    replaced, cached = one.read_bytes() + b"\0", load_index(own / "train")
    assert cached is not None
    one.write_bytes(replaced)
    size = f"1 image of another size (class_0/000: {len(replaced)} bytes, not {len(replaced) - 1})"
    assert size in resume()
    shutil.copy(two, two.with_name("zz.jpg"))
    assert f"(1 image more (class_0/zz); {size})" in resume()
    two.with_name("zz.jpg").rename(own / "train" / "class_1" / "zz.jpg")
    three.unlink()
    assert f"(1 image more (class_1/zz); 1 image fewer (class_0/002); {size})" in resume()


def test_relabelled_and_reordered_lists_are_named(own: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(own)) for path in own.glob("train/*/*.jpg"))
    lines = [f"{name}\t{name.split('/')[1]}" for name in names]
    data = own / "list.txt"
    data.write_text("\n".join(lines))
    train(tiny_recipe, data, tmp_path / "run")
    data.write_text("\n".join([lines[0].replace("\tclass_0", "\tclass_2"), *lines[1:]]))
    with pytest.raises(InputError, match=r"\(1 image with another label \(train/class_0/000: class_2, not class_0\)\)"):
        train(tiny_recipe, data, tmp_path / "run", resume=True)
    data.write_text("\n".join([*lines[1:], lines[0]]))
    with pytest.raises(InputError, match=r"the same images in another order \(from image 0, train/class_0/000, on\)"):
        train(tiny_recipe, data, tmp_path / "run", resume=True)


def test_emptied_images_differ_and_lists_of_another_folder_do_not(own: Path) -> None:
    before = DataRecord.of(open_source(own / "train"))
    names = sorted((own / "train").glob("*/*.jpg"))
    for root in (own, own / "train", own.parent):
        listed = root / "listed.txt"
        listed.write_text("".join(f"{name.relative_to(root)}\t{name.parent.name}\n" for name in names))
        assert before.differences(DataRecord.of(open_source(listed))) == []
    names[0].write_bytes(b"")
    size = before.nbytes[0]
    found = before.differences(DataRecord.of(open_source(own / "train")))
    assert found == [f"1 image of another size (class_0/000: 0 bytes, not {size})"]


@pytest.mark.parametrize("form", ["shards", "beton"])
def test_the_converted_form_of_the_same_images_resumes_bit_for_bit(
    form: Literal["shards", "beton"], finished: Path, own: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """From files to converted data and back to files."""
    out, converted = tmp_path / "run", tmp_path / "converted"
    convert(Convert(src=own / "train", dst=converted, format=form))
    steps = iter([4, 8])
    for data in (own / "train", converted):
        with pytest.raises(mvssl.Interrupted):
            stop_after(next(steps), tiny_recipe, data, out, val=own / "val")
    train(tiny_recipe, own, out, resume=True)
    assert metrics(out) == metrics(finished)


def stop_after(step: int, recipe: Recipe, data: Path, out: Path, *, val: Path) -> None:
    """Train up to this step, and save there."""
    agree, calls = StopRequest.agree, iter(range(100))
    before = 0 if step == 4 else 4

    def at_step(self: StopRequest) -> str | None:
        agree(self)
        return "SIGTERM" if next(calls) + before == step else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "agree", at_step)
        train(recipe, data, out, val=val, resume=out.exists())


def test_a_cached_index_is_kept_while_the_files_have_its_sizes(own: Path) -> None:
    open_source(own / "train")
    forget_changed_index(own / "train")
    assert load_index(own / "train") is not None
    for path in own.glob("train/class_2/*.jpg"):
        path.write_bytes(b"")
    forget_changed_index(own / "train")
    assert load_index(own / "train") is None
    forget_changed_index(own / "val")  # without an index


def test_a_second_training_in_the_same_process_is_refused(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, messages = Loop.evaluate, list[str]()

    def second(self: Loop) -> None:
        thread = threading.Thread(target=refused)
        thread.start()
        thread.join()
        evaluate(self)

    def refused() -> None:
        with pytest.raises(InputError) as error:
            train(tiny_recipe, images, tmp_path / "second")
        messages.append(str(error.value))

    monkeypatch.setattr(Loop, "evaluate", second)
    train(tiny_recipe, images, tmp_path / "run")
    assert messages
    assert all(message.startswith("Another training runs in this process") for message in messages)
    assert metrics(tmp_path / "run") == metrics(finished)
    assert not (tmp_path / "second").exists()
