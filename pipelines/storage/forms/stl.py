"""STL-10 as downloaded: its binary files, packed or unpacked."""

from __future__ import annotations

import re

import numpy as np

from pipelines.runtime import InputError
from pipelines.storage.forms.base import NO_LABEL, FormSource, Found, Labels, Request, number_labels, unlabelled
from pipelines.storage.forms.blobs import text_of
from pipelines.storage.forms.look import Look
from pipelines.storage.forms.places import Place, RecordReader, check_published, find_places, first_member

_SIDE = 96
_BYTES = 3 * _SIDE * _SIDE
_NAME = re.compile(r"(train|test)_[Xy]\.bin|unlabeled_X\.bin|class_names\.txt")
_MEMBER = re.compile(r"(^|/)stl10_binary/|(^|/)((train|test)_[Xy]|unlabeled_X)\.bin$")
_PUBLISHED = {  # images and MD5
    "train_X.bin": (5_000, "918c2871b30a85fa023e0c44e0bee87f"),
    "test_X.bin": (8_000, "7f263ba9f9e0b06b93213547f721ac82"),
    "unlabeled_X.bin": (100_000, "5242ba1fed5e4be9e1e742405eb56ca4"),
}


def recognise(look: Look) -> bool:
    """Whether there are STL-10's files of pixels, or an archive of them."""
    return any(
        (_MEMBER.search("/" + file.name) and file.name.endswith("_X.bin")) or _MEMBER.search(first_member(file))
        for file in look.files
    )


def open_form(look: Look, request: Request) -> Found:
    """Open train, test and the unlabelled images."""
    if request.image is not None or request.label not in (None, NO_LABEL):
        option, value = ("--image", request.image) if request.image is not None else ("--label", request.label)
        raise InputError(f"{option} is {value!r} but must be left out for STL-10: leave it out.", field=option)
    places = {place.base: place for place in find_places(look, _NAME)}
    names = None
    if "class_names.txt" in places:
        lines = text_of(look.path, places["class_names.txt"].read()).split("\n")
        names = tuple(line.strip() for line in lines if line.strip())
    splits = {}
    for split, base in (("train", "train"), ("test", "test"), ("unlabeled", "unlabeled")):
        images = places.get(f"{base}_X.bin")
        if images is not None:
            labels = None if split == "unlabeled" or request.label == NO_LABEL else places.get(f"{base}_y.bin")
            if labels is None and split != "unlabeled" and request.label != NO_LABEL:
                raise InputError(
                    f"{look.path} has {base}_X.bin but not its labels {base}_y.bin: copy that file too, or use --label "
                    "none."
                )
            splits[split] = _source(look, images, labels, names, request)
    if not splits:
        raise InputError(f"{look.path} has no images of STL-10: give stl10_binary.tar.gz or the folder of its files.")
    return Found(
        what="STL-10 (binary version)", splits=splits if len(splits) > 1 else {"": next(iter(splits.values()))}
    )


def _source(
    look: Look, images: Place, labels: Place | None, names: tuple[str, ...] | None, request: Request
) -> FormSource:
    count = images.whole(0, _BYTES, "images")
    published = _PUBLISHED[images.base]
    if published[0] == count:
        check_published(images, published[1])
    found = unlabelled(count)
    if labels is not None:
        values = np.frombuffer(labels.read(), np.uint8).astype(np.int64)
        if len(values) != count:
            raise InputError(
                f"{look.path} has {count:,} images in {images.base} and {len(values):,} labels in {labels.base}: "
                "download it again."
            )
        if values.min() < 1:
            raise InputError(f"{look.path}: {labels.base} has the label 0 but they count from 1: download it again.")
        found = number_labels(values - 1, where=look.path, names=names)
    request.report(count)
    stem = images.base.removesuffix("_X.bin")
    return FormSource(
        look.path,
        keys=(f"{stem}/{row:06d}" for row in range(count)),
        labels=Labels(values=found.values, classes=found.classes),
        nbytes=np.full(count, _BYTES, dtype=np.int64),
        reader=RecordReader([(images, count)], start=0, stride=_BYTES, decode=_pixels),
        deep=(),
        largest=2 * _BYTES,
    )


def _pixels(record: bytes) -> np.ndarray:
    """Pixels, uint8 [96, 96, 3], of planes whose columns follow each other."""
    return np.frombuffer(record, np.uint8).reshape(3, _SIDE, _SIDE).transpose(2, 1, 0)
