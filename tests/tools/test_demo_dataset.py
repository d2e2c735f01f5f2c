"""The synthetic data set: readable, varied, balanced, reproducible, and not separable by colour."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.runtime import InputError
from tools.demo_images import CLASSES, SHAPES, TEXTURES, class_name, render_image, shape_distance, texture_field
from tools.make_demo_dataset import DemoDataset, make_demo_dataset

PER_CLASS = 60


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def rendered() -> tuple[list[np.ndarray], np.ndarray]:
    """Images and their labels, PER_CLASS of every class."""
    labels = np.arange(PER_CLASS * len(CLASSES)) % len(CLASSES)
    return [render_image(int(kind), np.random.default_rng([7, i])) for i, kind in enumerate(labels)], labels


def test_folder_holds_balanced_readable_jpegs_of_many_sizes(tmp_path: Path) -> None:
    counts = make_demo_dataset(DemoDataset(out=tmp_path / "d", num_train=30, num_val=9, classes=4))
    assert counts == {"train": 30, "val": 9}
    sizes = set()
    for split, expected in (("train", [8, 8, 7, 7]), ("val", [3, 2, 2, 2])):
        folders = [tmp_path / "d" / split / class_name(kind) for kind in range(4)]
        assert sorted((tmp_path / "d" / split).iterdir()) == sorted(folders)
        assert [len(list(folder.glob("*.jpg"))) for folder in folders] == expected
        for path in (tmp_path / "d" / split).rglob("*.jpg"):
            with Image.open(path) as image:
                image.load()
                assert (image.format, image.mode) == ("JPEG", "RGB")
                assert 80 <= max(image.size) <= 200
                assert 0.73 <= image.width / image.height <= 1.37  # 3/4 to 4/3 with rounding to whole pixels
                sizes.add(image.size)
    assert len(sizes) > 30


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed, train in (("a", 3, 12), ("b", 3, 12), ("c", 4, 12), ("longer", 3, 15)):
        make_demo_dataset(DemoDataset(out=tmp_path / name, num_train=train, num_val=9, seed=seed))
    first, again, other, longer = (digest(tmp_path / name) for name in ("a", "b", "c", "longer"))
    assert first == again
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())
    assert len(set(first.values())) == len(first), "no image occurs twice, within or across the splits"
    assert first.items() <= longer.items(), "a larger data set begins with the smaller one"


def test_running_again_replaces_the_data_set_and_nothing_else(tmp_path: Path) -> None:
    make_demo_dataset(DemoDataset(out=tmp_path / "d", num_train=18, num_val=9))
    make_demo_dataset(DemoDataset(out=tmp_path / "d", num_train=4, num_val=4, classes=4))
    assert len(list((tmp_path / "d").rglob("*.jpg"))) == 8
    mine = tmp_path / "d" / "train" / "holidays"
    mine.mkdir()
    (mine / "beach.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match="holidays"):
        make_demo_dataset(DemoDataset(out=tmp_path / "d", num_train=18, num_val=9))
    assert (mine / "beach.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("field", "value"), [("classes", 1), ("classes", 9), ("num_train", 7), ("num_val", 0), ("seed", -1)]
)
def test_invalid_numbers_are_refused(field: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=field):
        DemoDataset(out=tmp_path, **{field: value})


@pytest.mark.parametrize("count", range(2, len(CLASSES) + 1))
def test_first_classes_never_differ_in_shape_alone_or_texture_alone(count: int) -> None:
    """Every prefix with two or more classes needs two textures and two shapes."""
    assert len({CLASSES[kind] for kind in range(count)}) == count
    assert len({shape for shape, _ in CLASSES[:count]}) >= 2
    assert len({texture for _, texture in CLASSES[:count]}) >= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_cover_the_same_area(shape: str) -> None:
    """Measured on a fine grid: pi, so that the area does not give away the class."""
    side = np.linspace(-3, 3, 1201, dtype=np.float32)
    u, v = np.meshgrid(side, side)
    inside = shape_distance(shape, u, v) < 1
    assert not inside[0].any()
    assert not inside[:, 0].any()
    assert inside.sum() * (6 / 1200) ** 2 == pytest.approx(np.pi, rel=0.01)


@pytest.mark.parametrize("texture", [name for name in TEXTURES if name != "rayed"])
def test_textures_are_periodic_with_period_one(texture: str) -> None:
    """Along the axis the field repeats after one period, or after two for the lattice of dots."""
    u = np.linspace(0, 2, 101, dtype=np.float32)
    now, later = texture_field(texture, u, 0 * u), texture_field(texture, u + 2, 0 * u)
    np.testing.assert_allclose(now, later, atol=1e-4)
    assert np.ptp(now) > 1


def test_rays_vary_only_along_circles() -> None:
    angle = np.linspace(0, 2 * np.pi, 100, dtype=np.float32)
    near, far = (texture_field("rayed", radius * np.cos(angle), radius * np.sin(angle)) for radius in (1, 3))
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert np.count_nonzero(np.diff(np.sign(near))) == 16  # eight rays and eight gaps


def colour_features(image: np.ndarray) -> np.ndarray:
    """Mean, standard deviation and an 8-bin histogram of each channel and of the luminance: [4 * 10]."""
    channels = np.concatenate([image.reshape(-1, 3), image.mean(axis=2).reshape(-1, 1)], axis=1) / 255.0
    histogram = [np.histogram(channel, bins=8, range=(0, 1))[0] / len(channel) for channel in channels.T]
    return np.concatenate([channels.mean(axis=0), channels.std(axis=0), *histogram])


def colour_accuracy(images: list[np.ndarray], labels: np.ndarray, columns: slice) -> float:
    """Leave-one-out accuracy of the nearest neighbour in standardised colour features."""
    features = np.stack([colour_features(image)[columns] for image in images])  # [N, 40 or fewer]
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    squares = (features**2).sum(axis=1)
    distance = squares[:, None] + squares[None, :] - 2 * features @ features.T
    np.fill_diagonal(distance, np.inf)
    return float((labels[distance.argmin(axis=1)] == labels).mean())


@pytest.mark.parametrize("columns", [slice(0, 4), slice(None)], ids=["mean", "histogram"])
def test_nearest_neighbours_in_colour_are_at_chance(
    rendered: tuple[list[np.ndarray], np.ndarray], columns: slice
) -> None:
    """At most 3 standard deviations above chance; a tint of 30/255 per class is far above."""
    images, labels = rendered
    assert (np.bincount(labels) == PER_CLASS).all()
    chance = 1 / len(CLASSES)
    bound = chance + 3 * np.sqrt(chance * (1 - chance) / len(labels))
    tinted = [np.clip(p + 30.0 * (kind % 3 - 1), 0, 255) for p, kind in zip(images, labels, strict=True)]
    assert colour_accuracy(tinted, labels, columns) > bound, "the measure detects colour"
    assert colour_accuracy(images, labels, columns) < bound
