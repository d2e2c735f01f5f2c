"""Fine-tuning: the whole network learns from all labels, a fraction, or those of a list (PAPER.md section 6)."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mvssl.config.evaluation import LabelSubset, Supervision
from mvssl.evaluate.linear_fit import stratified
from mvssl.evaluate.session import EvalSession, check_labelled
from mvssl.evaluate.supervised import Classifier, train_and_measure
from mvssl.weights.backbone_file import export_backbone
from pipelines.files import read_regular, strict_text
from pipelines.loading.deep_images import pixels_of
from pipelines.names import say
from pipelines.runtime import InputError, invalid, shown
from pipelines.storage.source import Source, SubsetSource

_LARGEST_LIST = 1 << 28  # bytes


def finetune(
    session: EvalSession, supervision: Supervision, subset: LabelSubset, *, backbone_out: Path | None = None
) -> dict[str, Any]:
    """Train the whole network on labelled images and measure it on val.

    Args:
        session: the backbone and the images.
        supervision: how to train.
        subset: the training images whose labels are used.
        backbone_out: file for the fine-tuned backbone; None writes none.

    Raises:
        InputError: labels are missing or do not match, images cannot be decoded, or training diverges.
    """
    check_labelled("finetune", session.train, session.val)
    session.labelled_val()
    source = subset_of(session.train, subset)
    classes = len(session.train.classes)
    absent = classes - len(np.unique(source.labels))
    if absent:
        say(session.console, f"{absent} of {classes} classes have no labelled image", style="yellow")
    size = min(supervision.batch_size, len(source))
    supervision = dataclasses.replace(supervision, batch_size=size - size % session.world.size or size)
    identity = session.identity("finetune", images=pixels_of(source), **supervision.identity())
    model = Classifier(
        session.loaded.backbone, session.width, classes, head_std=supervision.head_std, seed=supervision.seed
    ).to(session.device)
    name = f"finetune-{subset.name()}-{session.loaded.name}"
    results = train_and_measure(session, model, source, supervision, name=name, identity=identity)
    if backbone_out is not None:
        session.world.run_on_rank0(lambda: export_backbone(model.backbone, session.loaded.architecture, backbone_out))
    return results


def subset_of(source: Source, subset: LabelSubset) -> Source:
    """The images of a source whose labels are used.

    Raises:
        InputError: the fraction is out of range, or the list does not fit the source.
    """
    if subset.label_list is not None:
        return SubsetSource(source, listed_images(source, subset.label_list))
    if subset.labels == 1:
        return source
    return SubsetSource(source, labelled_share(source, subset.labels, seed=subset.label_seed))


def labelled_share(source: Source, share: float, *, seed: int) -> NDArray[np.int64]:
    """int64, ascending: a random fraction of the images of each class, at least one of each.

    Raises:
        InputError: `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise invalid("labels", share, "above 0 and at most 1", "0.01 and 0.1 are usual")
    if share == 1:
        return np.arange(len(source))
    labels = torch.from_numpy(source.labels)
    chosen = stratified(labels, share, seed=seed)
    for label in set(source.labels.tolist()) - set(labels[chosen].tolist()):  # a class of one image
        chosen[int((labels == label).nonzero()[0])] = True
    return np.flatnonzero(chosen.numpy())


def _without_ending(name: str) -> str:
    """A file's name without its ending; a name such as "." as it is."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.name else name


def listed_images(source: Source, path: Path) -> NDArray[np.int64]:
    """int64: the images that a text file names, one per line, by key or by file name alone.

    SimCLR's lists of 1 and 10 % of ImageNet hold such file names (n01440764_10026.JPEG).

    Raises:
        InputError: the file cannot be read, is empty, or names an image that is missing or ambiguous.
    """
    try:
        text = strict_text(read_regular(path, most=_LARGEST_LIST))
    except (OSError, ValueError) as error:
        raise InputError(f"label_list is {str(path)!r} but cannot be read ({error}): give a text file.") from error
    names = [line.strip() for line in text.split("\n") if line.strip()]
    if not names:
        raise InputError(f"label_list is {str(path)!r}, which names no images: give one name per line.")
    places: dict[str, list[int]] = {}
    for index in range(len(source)):
        key = source.key(index)
        file = PurePosixPath(key)
        for name in {key, file.name, _without_ending(key), file.stem}:
            places.setdefault(name, []).append(index)
    indices = []
    for name in dict.fromkeys(names):
        found = places.get(name) or places.get(_without_ending(name), [])
        if len(found) != 1:
            problem = "does not exist" if not found else f"matches {len(found)} images"
            raise InputError(
                f"label_list names {shown(name)}, which {problem} in {source.location}: give the names of its images, "
                "with their folders if files in different folders share a name."
            )
        indices.append(found[0])
    return np.array(indices, dtype=np.int64)
