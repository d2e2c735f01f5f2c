"""Which labelled images a classifier may learn from: all, a share of each class, or those of a list."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray

from mvssl.evaluate.linear_fit import stratified
from pipelines.runtime import InputError, invalid
from pipelines.storage.source import Source


def labelled_share(source: Source, share: float, *, seed: int) -> NDArray[np.int64]:
    """int64, rising: a share of the images of each class, drawn, at least one of each class.

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


def listed_images(source: Source, path: Path) -> NDArray[np.int64]:
    """int64: the images that a text file names, one a line, by their key or by their file name alone.

    SimCLR's lists of 1 and 10 % of ImageNet hold such file names (n01440764_10026.JPEG).

    Raises:
        InputError: the file cannot be read, names nothing, an image that is not there, or one that is not unique.
    """
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"label_list is {str(path)!r} but cannot be read ({error}): give a text file.") from error
    if not names:
        raise InputError(f"label_list is {str(path)!r}, which names no images: give one name a line.")
    places: dict[str, list[int]] = {}
    for index in range(len(source)):
        key = source.key(index)
        file = PurePosixPath(key)
        for name in {key, file.name, str(file.with_suffix("")), file.stem}:
            places.setdefault(name, []).append(index)
    indices = []
    for name in dict.fromkeys(names):
        found = places.get(name) or places.get(str(PurePosixPath(name).with_suffix("")), [])
        if len(found) != 1:
            what = "is not there" if not found else f"are {len(found)} images"
            raise InputError(
                f"label_list names {name!r}, which {what} in {source.location}: give the names of its images, with "
                "their folders if files of different folders share a name."
            )
        indices.append(found[0])
    return np.array(indices, dtype=np.int64)
