"""Whatever is given as data in Python gives the pixels, views and labels of the same images in a folder."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas  # type: ignore[import-untyped]
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pipelines import InputError, paper_views
from pipelines.decode.pillow import decode_one
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.storage import open_source
from pipelines.storage.given import source_of, splits_of
from pipelines.storage.source import Source

COUNT = 9
SPECS = paper_views(num_local=1, num_cutout=1, size=32, local_size=16, blur_kernel=5)


class Items(Dataset[Any]):
    """A map-style dataset that calls a function."""

    def __init__(self, item: Callable[[int], Any], count: int = COUNT) -> None:
        self.item, self.count = item, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def raising(error: Exception) -> Any:
    raise error


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        yield 1


@pytest.fixture(scope="module")
def arrays() -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, 256, (40 + 3 * n, 61 - n, 3), dtype=np.uint8) for n in range(COUNT)]


@pytest.fixture(scope="module")
def folder(arrays: list[NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as PNG files in classes c0 to c2, sorted as the arrays are."""
    root = tmp_path_factory.mktemp("given") / "png"
    for n, array in enumerate(arrays):
        (root / f"c{n // 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / f"c{n // 3}" / f"{n:02d}.png")
    return root


def png(array: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def hub(arrays: list[NDArray[np.uint8]]) -> Any:
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["c0", "c1", "c2"])})
    rows = {"picture": [Image.fromarray(array) for array in arrays], "label": [n // 3 for n in range(COUNT)]}
    return datasets.Dataset.from_dict(rows, features=features)


def forms(arrays: list[NDArray[np.uint8]], folder: Path) -> dict[str, Any]:
    """The images with the labels c0 to c2 in every form."""
    paths = sorted(folder.rglob("*.png"))
    name = [f"c{n // 3}" for n in range(COUNT)]
    chw = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    image_folder = torchvision.datasets.ImageFolder(str(folder))
    return {
        "path": str(folder),
        "pairs of paths": list(zip(paths, name, strict=True)),
        "pairs of folders": [(folder / one, one) for one in ("c0", "c1", "c2")],
        "Pillow": [(Image.fromarray(array), one) for array, one in zip(arrays, name, strict=True)],
        "arrays in mappings": [{"image": array, "label": one} for array, one in zip(arrays, name, strict=True)],
        "bytes": list(zip(map(png, arrays), name, strict=True)),
        "tensors": Items(lambda n: (chw[n], name[n])),
        "bytes as a tensor": Items(lambda n: (torch.frombuffer(bytearray(png(arrays[n])), dtype=torch.uint8), name[n])),
        "a mapping with more": Items(lambda n: {"target": name[n], "id": n, "img": Image.fromarray(arrays[n])}),
        "paths of a dataset": Items(lambda n: (paths[n], name[n], "more")),
        "ImageFolder": image_folder,
        "ImageFolder with a transform": torchvision.datasets.ImageFolder(
            str(folder), transform=torchvision.transforms.PILToTensor()
        ),
        "Subset": Subset(Items(lambda n: (arrays[-1 - n], name[-1 - n])), list(range(COUNT - 1, -1, -1))),
        "ConcatDataset": ConcatDataset([Subset(image_folder, [0, 1, 2, 3]), Subset(image_folder, [4, 5, 6, 7, 8])]),
        "hub": hub(arrays),
        "hub, decoded as tensors": hub(arrays).with_format("torch"),
        "hub, transformed": hub(arrays).with_transform(
            lambda rows: {"image": rows["picture"], "label": [f"c{label}" for label in rows["label"]]}
        ),
        "hub, chosen rows": hub(arrays + arrays[:0]).select(range(COUNT)),
        "splits": datasets.DatasetDict({"train": hub(arrays), "validation": hub(arrays).select([0])}),
        "pandas": pandas.DataFrame({"path": list(map(str, paths)), "label": name}),
    }


NAMES = (
    *("path", "pairs of paths", "pairs of folders", "Pillow", "arrays in mappings", "bytes", "tensors"),
    *("bytes as a tensor", "a mapping with more", "paths of a dataset", "ImageFolder", "ImageFolder with a transform"),
    *("Subset", "ConcatDataset", "hub", "hub, decoded as tensors", "hub, transformed", "hub, chosen rows", "splits"),
    "pandas",
)


def views_of(source: Source) -> list[torch.Tensor]:
    loader = Loader(source, SPECS, Order(num_images=len(source), batch_size=3, seed=7))
    try:
        return [view.clone() for batch in loader.epoch(1) for view in (*batch.views, batch.labels, batch.index)]
    finally:
        loader.close()


@pytest.mark.parametrize("name", NAMES)
def test_views_and_labels_are_those_of_the_same_pixels_as_png(
    name: str, arrays: list[NDArray[np.uint8]], folder: Path
) -> None:
    every = forms(arrays, folder)
    assert tuple(every) == NAMES
    source = source_of(every[name])
    assert source.classes == ("c0", "c1", "c2")
    assert len(source.fingerprint) == 64
    assert source.fingerprint == source_of(every[name]).fingerprint
    expected, found = views_of(open_source(folder)), views_of(source)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "F"])
def test_images_of_pillow_in_other_modes_decode_as_their_file_does(mode: str, arrays: list[NDArray[np.uint8]]) -> None:
    image = Image.fromarray(arrays[0])
    if mode in ("I;16", "F"):
        image = Image.fromarray((arrays[0][:, :, 0].astype(np.uint16) << 8) + 255)
        image = image if mode == "I;16" else image.convert("F")
    else:
        image = image.convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    file = io.BytesIO()
    image.save(file, "TIFF" if mode in ("CMYK", "F") else "PNG")
    expected = decode_one(np.frombuffer(file.getvalue(), np.uint8))
    source = source_of([image])
    found = decode_one(source.read(0))
    assert isinstance(expected, np.ndarray) or mode == "F"  # whose range is not known
    np.testing.assert_array_equal(found, expected)
    assert image.mode == mode


def test_images_of_pillow_whose_files_are_closed_are_used_if_they_were_loaded(
    arrays: list[NDArray[np.uint8]],
) -> None:
    file = io.BytesIO(png(arrays[0]))
    with Image.open(file) as image:
        image.load()
    np.testing.assert_array_equal(decode_one(source_of([image]).read(0)), arrays[0])
    with Image.open(file) as image:
        pass
    with pytest.raises(InputError, match=r"whose file is closed but must be open or loaded: call load\(\)"):
        source_of([image])


def test_an_image_of_pillow_is_turned_upright(arrays: list[NDArray[np.uint8]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(arrays[0]).save(file, "PNG", exif=exif)
    found = decode_one(source_of([Image.open(file)]).read(0))
    np.testing.assert_array_equal(found, np.rot90(arrays[0], k=-1))


def test_arrays_of_any_channels(arrays: list[NDArray[np.uint8]]) -> None:
    colour = arrays[0][:30, :30]
    gray = np.repeat(colour[:, :, :1], 3, axis=2)
    alpha = np.concatenate([colour, colour[:, :, :1]], axis=2)
    thin = arrays[0][:3, :, :]
    cases: list[tuple[Any, NDArray[np.uint8]]] = [
        (colour[:, :, 0], gray),
        (colour[:, :, :1], gray),
        (colour[None, :, :, 0], gray),
        (alpha, colour),
        (np.moveaxis(alpha, -1, 0), colour),
        (torch.from_numpy(colour.copy()).permute(2, 0, 1), colour),
        (torch.from_numpy(colour.copy()), colour),
        (thin, thin),  # 3 rows: an array is [H, W, C] if it can be
        (torch.from_numpy(thin.copy()).permute(2, 0, 1), thin),
        (colour[::-1, ::2], colour[::-1, ::2]),
    ]
    for given, expected in cases:
        np.testing.assert_array_equal(decode_one(source_of([given]).read(0)), expected)
    stacked = np.stack([colour, colour[::-1]])
    for whole in (stacked, torch.from_numpy(stacked).permute(0, 3, 1, 2)):
        np.testing.assert_array_equal(decode_one(source_of(whole).read(1)), colour[::-1])


@pytest.mark.parametrize(
    ("data", "labels", "classes"),
    [
        (lambda image: [(image, 10), (image, 2), (image, None)], [1, 0, -1], ("2", "10")),
        (lambda image: [(image, "dog"), (image, "cat")], [1, 0], ("cat", "dog")),
        (lambda image: [(image, 7), (image, float("nan"))], [0, -1], ("7",)),
        (lambda image: Items(lambda n: (image, torch.tensor(n % 2)), 3), [0, 1, 0], ("0", "1")),
        (lambda image: Items(lambda n: (image, np.float32(0.5)), 2), [-1, -1], ()),
        (
            lambda image: TensorDataset(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([4, 1])),
            [1, 0],
            ("1", "4"),
        ),
        (lambda image: TensorDataset(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), [-1, -1], ()),
        (lambda image: datasets.Dataset.from_dict({"jpg": [png(image)] * 2, "cls": [7, 5]}), [1, 0], ("5", "7")),
        (lambda image: datasets.Dataset.from_dict({"path": ["x"], "img": [png(image)]}), [-1], ()),
    ],
)
def test_labels(data: Callable[[Any], Any], labels: list[int], classes: tuple[str, ...]) -> None:
    source = source_of(data(np.zeros((8, 8, 3), np.uint8)))
    assert source.labels.tolist() == labels
    assert source.classes == classes


def test_splits_of_a_mapping_are_known_by_other_names_if_each_is_the_only_one() -> None:
    assert splits_of({"Training": 1, "dev_set": 2, "Testing": 3}) == (1, 2)
    assert splits_of({"train": 1, "train_extra": 2, "val2014": 3, "val2017": 4}) == (1, None)


def test_a_datasets_own_targets_and_classes_are_taken_if_its_items_say_the_same() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    read: list[int] = []

    def item(n: int) -> Any:
        read.append(n)
        return image, n % 2

    dataset: Any = Items(item, 100)
    dataset.targets, dataset.classes = [n % 2 for n in range(100)], ["even", "odd"]
    source = source_of(dataset)
    assert source.classes == ("even", "odd")
    assert source.labels.tolist() == dataset.targets
    assert len(set(read)) < 20, "not every item is read"
    dataset.targets = [1 - n % 2 for n in range(100)]
    assert source_of(dataset).labels.tolist() == [n % 2 for n in range(100)]


IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, "data is 3 but must be a path, a list of paths"),
        (
            [["a.png", "b.jpg"], ["c.png", "d.jpg"]],
            r"data\[0\] is a list of 2 paths but must be one path, or .*: give one",
        ),
        ([IMAGE, ("a.png", "b.jpg", "c.gif")], r"data\[1\] is a list of 3 paths but must be one path"),
        (None, "data is None but must be a path"),
        ([], "data is an empty list but must hold images"),
        ([1, 2], r"data\[0\] is 1 but data must be a path, a list"),
        (["nowhere.jpg"], r"data\[0\] is '.*nowhere.jpg', which does not exist \(1 of 1 do not\)"),
        ([(".", 0.5)], r"data\[0\] has the label 0.5 but must have a whole number or text"),
        ([(".", np.eye(3)[1])], r"data\[0\] has the label .* but must have a whole number or text"),
        (
            [(IMAGE, 2), (IMAGE, 1.5)],
            r"data\[1\] has the label 1.5 but must have a whole number or text, None for none",
        ),
        ([(IMAGE, True), (IMAGE, False)], r"data\[0\] has the label True but must"),
        ([(IMAGE, "dog"), (IMAGE, b"cat")], r"data\[1\] has the label b'cat' but must"),
        (Items, "data is <class .*Items'> but must be a path"),
        (Stream(), "data is a Stream, which gives images in its own order only, but must have a length"),
        (iter([IMAGE]), "data is a list_iterator, which gives images in its own order only"),
        ({"test": [IMAGE]}, "data is a dict of test but must have the split train"),
        (DataLoader(Items(lambda n: IMAGE)), r"data is a DataLoader but must be a dataset: give .*data=loader.dataset"),
        (
            Items(lambda n: None),
            r"data is Items with 9 items but must hold images: item 0 is None \(NoneType\) but must be",
        ),
        (Items(lambda n: "no.png"), r"item 0 cannot be read \(No such file or directory \(no.png\)\)"),
        (Items(lambda n: {"a": 1, "b": 2}), "item 0 is a mapping of a, b but must be one with an image: name the"),
        (Items(lambda n: (IMAGE, IMAGE)), "item 0 is a list of 2 images but must be one: leave out"),
        (
            Items(lambda n: np.zeros((2, 2, 5), np.uint8)),
            r"item 0 is an array of uint8 \[2, 2, 5\] but must be of 1, 3 or",
        ),
        (
            Items(lambda n: torch.zeros(3, 4, 4)),
            r"item 0 is a tensor of float32 \[3, 4, 4\] but must be of uint8: leave out",
        ),
        (
            Items(lambda n: torch.zeros(3, 4, 4, dtype=torch.bfloat16)),
            "item 0 is a tensor of bfloat16 .* but must be of",
        ),
        (b"photos", "data is b'photos' but must be a path"),
        (
            np.zeros((8, 9, 3), np.uint8),
            r"data is an array \[8, 9, 3\], which may be one image, but must be of several",
        ),
        (torch.zeros(3, 8, 9, dtype=torch.uint8), r"data is an array \[3, 8, 9\], which may be one image"),
        (
            (np.zeros((2, 8, 9, 3), np.uint8), np.zeros(2, np.int64)),
            r"data is an array of images and one of labels but .*: give list\(zip\(images, labels\)\)",
        ),
        ([io.BytesIO(b"x")], r"item 0 is an open file \(BytesIO\) but must be .*: give its bytes, file.read\(\)"),
        ([Image.new("RGB", (0, 5))], "item 0 is an image of 0 by 5 pixels but must be of one pixel or more"),
        (Items(lambda n: raising(OSError())), r"item 0 cannot be read \(OSError\)"),
        (Items(lambda n: ([IMAGE, IMAGE], 3)), "item 0 is a list of 2 images but must be one"),
        (Items(lambda n: IMAGE, -1), r"data is a Items, which has no length \(__len__ raised ValueError"),
        (Items(lambda n: dict[int, Any]()[n]), r"item 0 cannot be read \(the dataset raised KeyError: 0\)"),
        (Items(lambda n: exec("raise SystemExit(3)")), r"the dataset raised SystemExit: 3"),
        (datasets.Dataset.from_dict({"text": ["a"]}), "columns text, of which none holds images"),
        (
            datasets.Dataset.from_dict({"left": [b"a"], "right": [b"b"]}),
            r"columns of images left, right but must have one: keep one, as data.select_columns\(\['left'\]\)",
        ),
    ],
)
def test_what_holds_no_images_is_refused_in_a_sentence(data: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        source_of(data)
    assert str(caught.value).endswith(".")


def test_items_that_fail_are_bad_images_named_by_their_index() -> None:
    def item(n: int) -> Any:
        if n == 5:
            raise ValueError("no such frame")
        return (IMAGE + n).astype(np.float32) if n == 11 else IMAGE + n

    source = source_of(Items(item, 32))
    loader = Loader(source, SPECS, Order(num_images=32, batch_size=16, seed=1))
    index = torch.cat([batch.index for batch in loader.epoch(0)])
    loader.close()
    assert set(loader.stats.bad) == {"item 5", "item 11"}
    assert "the dataset raised ValueError: no such frame" in loader.stats.bad["item 5"]
    assert "item 11 is an array of float32" in loader.stats.bad["item 11"]
    assert len(index) == 32
    assert not {5, 11} & set(index.tolist())


def test_a_dataset_that_fails_later_ends_the_epoch_in_a_sentence() -> None:
    broken = threading.Event()

    def item(n: int) -> Any:
        if broken.is_set():
            raise RuntimeError("the server is gone")
        return IMAGE

    source = source_of(Items(item, 32))
    broken.set()
    loader = Loader(source, SPECS, Order(num_images=32, batch_size=16, seed=1))
    with pytest.raises(InputError, match=r"16 of the 16 images of a batch .*item \d+ .*the server is gone"):
        list(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize("safe", [False, True])
def test_a_dataset_is_asked_by_one_thread_at_a_time_unless_it_says_that_it_is_safe(safe: bool) -> None:
    inside, most = [0], [0]
    together = threading.Event()

    def item(n: int) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        if inside[0] > 1:
            together.set()
        together.wait(0.02) if not safe else time.sleep(0.02)
        inside[0] -= 1
        return IMAGE

    dataset: Any = Items(item, 32)
    dataset.thread_safe = safe
    loader = Loader(source_of(dataset), SPECS, Order(num_images=32, batch_size=32, seed=1))
    list(loader.epoch(0))
    loader.close()
    assert (most[0] > 1) == safe


def test_a_dataset_of_other_pixels_each_time_is_said_and_may_be_resumed() -> None:
    generator = np.random.default_rng(0)
    dataset = Items(lambda n: generator.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    source = source_of(dataset)
    assert "gives other pixels for an item at each call" in source.facts.notes[0]  # type: ignore[attr-defined]
    assert source.fingerprint == source_of(dataset).fingerprint
