"""Detection on drawn images in COCO's format: data against pycocotools, the schedule, and a training that learns."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from rich.console import Console
from torchvision import tv_tensors
from torchvision.models import detection
from torchvision.transforms.v2.functional import horizontal_flip

from pipelines.runtime import InputError
from tools.coco_data import CocoSplit, detections, flipped, score
from tools.coco_torchvision import Arguments, Batches, body, build, train

CATEGORIES = {"disc": 7, "square": 3}  # ids are not consecutive, as in COCO


def draw(root: Path, name: str, *, count: int, seed: int, size: tuple[int, int] = (96, 128)) -> None:
    """Images with one to three red discs and blue squares; squares as polygons, discs as RLE."""
    generator = np.random.default_rng(seed)
    (root / name).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        height, width = size if number % 4 else size[::-1]
        image = Image.fromarray(generator.integers(90, 160, (height, width, 3), dtype=np.uint8))
        images.append({"id": 100 + number, "file_name": f"{number}.jpg", "height": height, "width": width})
        for _ in range(generator.integers(1, 4)):
            radius = int(generator.integers(10, 20))
            x, y = int(generator.integers(0, width - 2 * radius)), int(generator.integers(0, height - 2 * radius))
            kind = "disc" if generator.random() < 0.5 else "square"
            corners = (x, y, x + 2 * radius, y + 2 * radius)
            canvas, shape = ImageDraw.Draw(image), Image.new("L", (width, height))
            if kind == "disc":
                canvas.ellipse(corners, fill=(220, 30, 30))
                ImageDraw.Draw(shape).ellipse(corners, fill=1)
                code = rle.encode(np.asfortranarray(np.asarray(shape)))
                segmentation: Any = {"size": code["size"], "counts": code["counts"].decode()}
            else:
                canvas.rectangle(corners, fill=(30, 30, 220))
                left, top, right, bottom = corners
                segmentation = [[left, top, right, top, right, bottom, left, bottom]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + number,
                    "category_id": CATEGORIES[kind],
                    "bbox": [x, y, 2 * radius, 2 * radius],
                    "area": 4 * radius**2,
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
        image.save(root / name / f"{number}.jpg", quality=95)
    (root / "annotations").mkdir(exist_ok=True)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in CATEGORIES.items()],
    }
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    draw(root, "train2017", count=32, seed=0)
    draw(root, "val2017", count=8, seed=1)
    return root


def split_of(data: Path, name: str = "val2017") -> CocoSplit:
    return CocoSplit(images=data / name, annotations=data / "annotations" / f"instances_{name}.json")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    resnet = torchvision.models.resnet18()
    torch.save({n: t for n, t in resnet.state_dict().items() if not n.startswith("fc.")}, path)
    return path


def test_images_and_instances_are_those_of_torchvisions_reader(data: Path) -> None:
    split = split_of(data)
    theirs = torchvision.datasets.CocoDetection(str(split.images), str(split.annotations))
    assert len(split) == len(theirs) == 8
    for index in range(len(split)):
        image, target = split[index]
        expected, entries = theirs[index]
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(np.asarray(expected)).permute(2, 0, 1))
        boxes = torchvision.ops.box_convert(torch.tensor([e["bbox"] for e in entries]), "xywh", "xyxy")
        assert torch.equal(target["boxes"], boxes.float())
        assert [split.categories[label - 1] for label in target["labels"]] == [e["category_id"] for e in entries]
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            found = torchvision.ops.masks_to_boxes(mask[None])[0]
            assert (found - box).abs().max() <= 1.5  # of drawn pixels


def test_a_flip_moves_boxes_and_masks_with_the_pixels(data: Path) -> None:
    image, target = split_of(data)[0]
    mirrored, moved = flipped(image, target)
    assert torch.equal(mirrored, torch.from_numpy(np.fliplr(image.permute(1, 2, 0).numpy()).copy()).permute(2, 0, 1))
    before = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
    expected = horizontal_flip(before)
    assert torch.equal(moved["boxes"], torch.as_tensor(expected))
    assert torch.equal(moved["masks"], target["masks"].flip(2))
    assert torch.equal(flipped(mirrored, moved)[1]["boxes"], target["boxes"])


def test_perfect_detections_score_100_and_shifted_ones_less(data: Path) -> None:
    split = split_of(data)

    def found(shift: float, label: int = 0) -> list[dict[str, Any]]:
        entries = []
        for index, image_id in enumerate(split.ids):
            target = split[index][1]
            count = len(target["labels"])
            output = {
                "boxes": target["boxes"] + shift,
                "labels": (target["labels"] + label - 1) % 2 + 1,
                "scores": torch.ones(count),
                "masks": target["masks"][:, None].float(),
            }
            entries += detections(split, image_id, output)
        return entries

    perfect = score(split, found(0))
    assert perfect["bbox"]["AP"] == pytest.approx(100)
    assert perfect["segm"]["AP"] > 95  # polygons have other borders than drawn pixels
    shifted = score(split, found(6))
    assert shifted["bbox"]["AP"] < 40
    assert shifted["segm"] == perfect["segm"]
    assert score(split, found(0, label=1))["bbox"]["AP"] < 1
    assert score(split, [])["bbox"]["AP"] == 0


def test_the_schedule_is_detectron2s() -> None:
    def asked(**options: Any) -> Arguments:
        return Arguments(weights=Path("w"), data=Path("d"), out=Path("o"), **options)

    full = asked()
    assert full.total_steps == 90_000
    rates = [full.learning_rate(step) for step in (1000, 59_999, 60_000, 79_999, 80_000, 89_999)]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])
    assert full.learning_rate(0) == pytest.approx(0.02 / 1000)
    assert full.learning_rate(500) == pytest.approx(0.02 * (0.001 + 0.999 / 2))
    assert asked(schedule="2x", batch_size=8).total_steps == 360_000
    assert asked(batch_size=8).learning_rate(2000) == pytest.approx(0.01)


def test_batches_are_a_function_of_the_step(data: Path) -> None:
    split = split_of(data, "train2017")
    whole = list(Batches(split, batch_size=4, seed=1, rank=0, ranks=1)(start=0, stop=20))
    assert list(Batches(split, batch_size=4, seed=1, rank=0, ranks=1)(start=13, stop=20)) == whole[13:]
    shares = [list(Batches(split, batch_size=4, seed=1, rank=rank, ranks=2)(start=0, stop=20)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *shares, strict=True):
        assert sorted(batch) == sorted(first + second)
        wide = {split.coco.imgs[split.ids[index]]["width"] > 100 for index, _ in batch}
        assert len(wide) == 1, "formats are batched apart"
    epoch = [index for batch in whole[:8] for index, _ in batch]
    assert len(set(epoch)) == len(epoch) == 32


def test_the_model_is_the_exported_backbone_with_batch_normalisation(weights: Path, data: Path) -> None:
    model: Any = build(Arguments(weights=weights, data=data, out=data), 2, synchronised=False)
    tensors = torch.load(weights, weights_only=True)
    body_ = model.backbone.body.state_dict()
    assert body_.keys() == tensors.keys()
    assert all(torch.equal(body_[name], tensor) for name, tensor in tensors.items())
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 20 + 8, "of ResNet-18 and of four lateral and four output layers of the FPN"
    assert not any("Frozen" in type(module).__name__ for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_trains_resumes_and_scores(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 32 drawn images: it finds discs and squares, which an untrained one does not; a stop changes no number.

    Fewer proposals than by default, so that a core has done it in a minute.
    """
    few = partial(
        detection.MaskRCNN,
        box_batch_size_per_image=24,
        rpn_post_nms_top_n_train=60,
        rpn_post_nms_top_n_test=40,
        box_detections_per_img=6,
    )
    monkeypatch.setattr(detection, "MaskRCNN", few)

    def asked(out: str, *, steps: int, resume: bool = False) -> Arguments:
        (tmp_path / out).mkdir(exist_ok=True)
        return Arguments(
            weights=weights,
            data=data,
            out=tmp_path / out,
            steps=steps,
            batch_size=4,
            base_lr=0.04,
            workers=0,
            short_side=(96, 96),
            device="cpu",
            save_every=3,
            resume=resume,
        )

    quiet = Console(quiet=True)
    untrained = train(asked("untrained", steps=1), quiet)["results"]
    trained = train(asked("trained", steps=40), quiet)["results"]
    assert untrained["bbox"]["AP50"] < 5
    assert trained["bbox"]["AP50"] > 20
    assert trained["segm"]["AP50"] > 10

    whole = train(asked("whole", steps=5), quiet)["results"]
    seen = [0]
    step = torch.optim.SGD.step

    def stops(self: torch.optim.SGD, closure: None = None) -> None:
        seen[0] += 1
        if seen[0] == 5:
            raise KeyboardInterrupt
        step(self, closure)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.SGD, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            train(asked("stopped", steps=5), quiet)
    assert torch.load(tmp_path / "stopped/checkpoint.pt", weights_only=True)["step"] == 3
    assert train(asked("stopped", steps=5, resume=True), quiet)["results"] == whole


def test_bad_data_and_weights_are_named(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = data / "annotations/instances_val2017.json"
    content = json.loads(annotations.read_text())
    with pytest.raises(InputError, match=r"names 8 images, of which 8 are not in .*, e\.g\. 0\.jpg"):
        CocoSplit(images=tmp_path, annotations=annotations)
    for wrong, said in (
        ({}, "KeyError: 'images'"),
        (content | {"categories": []}, "category 3 is not among its categories"),
        (content | {"annotations": [{"id": 1}]}, "an entry of annotations has no image_id"),
        (content | {"annotations": [content["annotations"][0] | {"bbox": [1, 2]}]}, "a bbox has not four numbers"),
        (content | {"annotations": [content["annotations"][0] | {"bbox": [1, 2, 3, "4"]}]}, "has not four numbers"),
        (content | {"annotations": [content["annotations"][0] | {"image_id": 99}]}, "of the image 99, which is not"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=f"is not in COCO's format .*{said}"):
            CocoSplit(images=data / "val2017", annotations=tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(InputError, match="no image with an instance"):
        CocoSplit(images=data / "val2017", annotations=tmp_path / "a.json", only_annotated=True)
    with pytest.raises(InputError, match="No such file"):
        CocoSplit(images=data / "val2017", annotations=tmp_path / "none.json")

    def built(tensors: Any) -> None:
        torch.save(tensors, tmp_path / "w.pth")
        build(Arguments(weights=tmp_path / "w.pth", data=data, out=data), 2, synchronised=False)

    with pytest.raises(InputError, match="whose stages have"):
        built({"a": torch.zeros(1)})
    with pytest.raises(InputError, match="does not fit a ResNet-18"):
        built({n: t for n, t in torch.load(weights, weights_only=True).items() if n != "conv1.weight"})
    with pytest.raises(InputError, match="holds no tensors by name"):
        built([1, 2])
    (tmp_path / "w.pth").write_text("mine")
    with pytest.raises(InputError, match="which torch cannot read"):
        build(Arguments(weights=tmp_path / "w.pth", data=data, out=data), 2, synchronised=False)
    for options in ({"batch_size": 0}, {"short_side": (800, 640)}, {"base_lr": 0.0}):
        with pytest.raises(InputError, match=r"^(batch_size|short_side|base_lr) is "):
            Arguments(weights=weights, data=data, out=data, **options)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text("{}")
    command = ["x", "--weights", str(weights), "--data", str(data), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(InputError, match="which holds a run: add --resume or --overwrite"):
        body()
