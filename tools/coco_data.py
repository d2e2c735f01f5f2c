"""Images and instances in COCO's format, for training a detector and for scoring it with pycocotools."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipelines.files import read_json
from pipelines.runtime import InputError, describe_os_error

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""The first six numbers of COCO's summary: mean average precision over IoU 0.5 to 0.95, at 0.5, at 0.75, and of small,
medium and large objects."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoSplit(torch.utils.data.Dataset[tuple[Tensor, dict[str, Any]]]):
    """One split; item n is an image, float32 RGB [3, H, W] in [0, 1], and its instances.

    The instances: boxes float32 [I, 4] as (x0, y0, x1, y1) in pixels, labels int64 [I] from 1, masks uint8 [I, H, W],
    and image_id. Crowds and boxes without area are left out, as Detectron2 and torchvision do. An image is flipped
    horizontally if its index is drawn with `flip` (see `flipped`).

    Attributes:
        images: folder of the images.
        annotations: file of the annotations, such as instances_train2017.json.
        only_annotated: leave out images without an instance (training).
    """

    images: Path
    annotations: Path
    only_annotated: bool = False
    coco: Any = field(init=False, repr=False)
    ids: list[int] = field(init=False, repr=False)
    categories: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        coco = read_coco(self.annotations)
        ids = sorted(coco.imgs)
        if self.only_annotated:
            ids = [image for image in ids if any(_usable(entry) for entry in coco.imgToAnns.get(image, ()))]
        if not ids:
            raise InputError(f"{self.annotations} has no image with an instance: give the file of another split.")
        missing = [name for image in ids if not (self.images / (name := coco.imgs[image]["file_name"])).is_file()]
        if missing:
            raise InputError(
                f"{self.annotations} names {len(ids):,} images, of which {len(missing):,} are not in {self.images}, "
                f"e.g. {missing[0]}: name the folder of this split's images."
            )
        for name, value in (("coco", coco), ("ids", ids), ("categories", sorted(coco.cats))):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image = self.ids[index]
        path = self.images / self.coco.imgs[image]["file_name"]
        try:
            with Image.open(path) as file:
                pixels = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
            raise InputError(f"{path} cannot be decoded ({reason}): copy or download it again.") from error
        height, width = pixels.shape[:2]
        entries = [entry for entry in self.coco.imgToAnns.get(image, ()) if _usable(entry)]
        boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [self.coco.annToMask(entry) for entry in entries]
        shapes = {mask.shape for mask in masks} - {(height, width)}
        if shapes:
            raise InputError(
                f"{path} has {height} x {width} pixels but its annotations are for {shapes.pop()}: use the images that "
                "were annotated, without resizing or turning them."
            )
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255, {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.tensor([self.categories.index(e["category_id"]) + 1 for e in entries], dtype=torch.int64),
            "masks": torch.from_numpy(np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)),
            "image_id": image,
        }


def _usable(entry: dict[str, Any]) -> bool:
    return not entry.get("iscrowd") and entry["bbox"][2] > 0 and entry["bbox"][3] > 0


def read_coco(path: Path) -> Any:
    """pycocotools' index of an annotation file.

    Raises:
        InputError: pycocotools is missing, or the file is missing or not in COCO's format.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise InputError("pycocotools is not installed: pip install 'mvssl[coco]'.")
    from pycocotools.coco import COCO

    try:
        content = read_json(path)
        for part, needed in (
            ("images", ("id", "file_name")),
            ("annotations", ("image_id", "category_id", "bbox", "segmentation")),
            ("categories", ("id", "name")),
        ):
            for entry in content[part]:
                if missing := [name for name in needed if name not in entry]:
                    raise ValueError(f"an entry of {part} has no {missing[0]}")
        known = {entry["id"] for entry in content["categories"]}
        if unknown := {entry["category_id"] for entry in content["annotations"]} - known:
            raise ValueError(f"category {min(unknown)} is not among its categories")
        pictures = {entry["id"] for entry in content["images"]}
        for entry in content["annotations"]:
            box = entry["bbox"]
            if len(box) != 4 or not all(isinstance(side, (int, float)) for side in box):
                raise ValueError("a bbox has not four numbers")
            if entry["image_id"] not in pictures:  # they would be left out without a word
                raise ValueError(f"an entry of annotations is of the image {entry['image_id']}, which is not there")
        coco = COCO()
        coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({describe_os_error(error)}): name an annotation file.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not in COCO's format ({type(error).__name__}: {error}): it needs images, annotations with "
            "boxes and masks, and categories, as instances_train2017.json."
        ) from error
    return coco


def flipped(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Image and instances mirrored horizontally."""
    width = image.shape[-1]
    left, top, right, bottom = target["boxes"].unbind(1)
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    return image.flip(-1), target | {"boxes": boxes, "masks": target["masks"].flip(-1)}


def detections(split: CocoSplit, image_id: int, output: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A torchvision detector's output for one image as COCO's result entries; masks [I, 1, H, W] cut at 0.5."""
    from pycocotools import mask as rle

    entries = []
    boxes = output["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    masks = (output["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
    for box, label, score, mask in zip(
        boxes.tolist(), output["labels"].tolist(), output["scores"].tolist(), masks, strict=True
    ):
        code = rle.encode(np.asfortranarray(mask))
        code["counts"] = code["counts"].decode()
        category = split.categories[label - 1]
        entries.append(
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score, "segmentation": code}
        )
    return entries


def score(split: CocoSplit, found: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """COCO's average precisions in percent of boxes (bbox) and masks (segm), by name (`METRICS`); -1 where no object is
    of that size.
    """
    from pycocotools.cocoeval import COCOeval

    results: dict[str, dict[str, float]] = {}
    for kind in ("bbox", "segm"):
        if not found:
            results[kind] = dict.fromkeys(METRICS, 0.0)
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            # loadRes computes areas from the masks if it sees them: of boxes they are those of the boxes.
            kept = [{k: v for k, v in entry.items() if kind == "segm" or k != "segmentation"} for entry in found]
            if kind == "segm":
                kept = [{k: v for k, v in entry.items() if k != "bbox"} for entry in kept]
            evaluation = COCOeval(split.coco, split.coco.loadRes(kept), kind)
            evaluation.params.imgIds = split.ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = [float(value) for value in evaluation.stats[: len(METRICS)]]
        results[kind] = {n: value if value < 0 else 100 * value for n, value in zip(METRICS, values, strict=True)}
    return results
