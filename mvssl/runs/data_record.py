"""The images a run was started with, kept in its folder, so that a resumed run can say how other images differ."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.arrays import read_arrays
from pipelines.conversion.tar_writer import member_keys
from pipelines.files import write_whole
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import KeyTable, Source, check_columns

_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class DataRecord:
    """Names, sizes and labels of images, in the order of their indices.

    Attributes:
        keys: name of each image without its extension, as converted data have it.
        nbytes: int64 [len], encoded sizes; 0 where they are not known (Parquet), which differs from no size.
        labels: int64 [len], -1 for none.
        classes: class names by label.
        digests: dataset index -> hash of the content of some images that have neither names nor sizes.
        sized: whether a size of 0 is that of an empty file; False of a record that was read.
    """

    keys: KeyTable
    nbytes: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    digests: dict[int, str] = field(default_factory=dict)
    sized: bool = False

    @classmethod
    def of(cls, source: Source) -> DataRecord:
        """The record of a source."""
        keys = KeyTable.of(member_keys(source.key(index) for index in range(len(source))))
        facts = facts_of(source)
        digests = dict(facts.digests)
        nbytes = source.nbytes if facts.exact_sizes else np.zeros_like(source.nbytes)
        return cls(
            keys=keys,
            nbytes=nbytes,
            labels=source.labels,
            classes=source.classes,
            digests=digests,
            sized=facts.exact_sizes,
        )

    @classmethod
    def load(cls, path: Path) -> DataRecord | None:
        """The record in a file; None if there is none (runs of earlier versions) or it is damaged."""
        try:
            data = read_arrays(path)
            keys = KeyTable.checked(data["key_blob"], data["key_ends"])
            classes = tuple(KeyTable.checked(data["class_blob"], data["class_ends"]))
            nbytes, labels = data["nbytes"], data["labels"]
            check_columns(len(keys), len(classes), nbytes=nbytes, labels=labels)
            digests = {}
            if "digest_index" in data:  # only of images that Python objects hold
                texts = KeyTable.checked(data["digest_blob"], data["digest_ends"])
                digests = dict(zip(data["digest_index"].tolist(), texts, strict=True))
        except (OSError, ValueError, KeyError):
            return None
        return cls(keys=keys, nbytes=nbytes, labels=labels, classes=classes, digests=digests)

    def save(self, path: Path) -> None:
        """Write the record to a file, durably; some 6 bytes an image."""
        classes, content = KeyTable.of(self.classes), io.BytesIO()
        digests: dict[str, Any] = {}
        if self.digests:
            texts = KeyTable.of(self.digests.values())
            index = np.array(list(self.digests), dtype=np.int64)
            digests = {"digest_index": index, "digest_blob": texts.blob, "digest_ends": texts.ends}
        np.savez_compressed(
            content,
            key_blob=self.keys.blob,
            key_ends=self.keys.ends,
            nbytes=self.nbytes,
            labels=self.labels,
            class_blob=classes.blob,
            class_ends=classes.ends,
            **digests,
        )
        write_whole(path, content.getvalue())

    def differences(self, now: DataRecord) -> list[str]:
        """How the images `now` differ from these, e.g. "1 image more (a/zz)"; [] if views and labels are the same."""
        names, names_now = list(self.keys), list(now.keys)
        if (
            names != names_now and self.nbytes.all() and np.array_equal(self.nbytes, now.nbytes)
        ):  # a list may start at another folder
            bare, bare_now = _without_folder(names), _without_folder(names_now)
            names, names_now = (bare, bare_now) if bare == bare_now else (names, names_now)
        before = {key: index for index, key in enumerate(names)}
        after = {key: index for index, key in enumerate(names_now)}
        common = [key for key in before if key in after]
        here = np.array([before[key] for key in common], dtype=np.int64)
        there = np.array([after[key] for key in common], dtype=np.int64)
        found = [
            _named("more", [key for key in after if key not in before]),
            _named("fewer", [key for key in before if key not in after]),
        ]
        size_before, size = self.nbytes[here], now.nbytes[there]
        changed = (size_before != size) & (size_before > 0) & ((size > 0) | now.sized)
        found.append(
            _named(
                "of another size",
                [f"{common[i]}: {size[i]} bytes, not {size_before[i]}" for i in np.flatnonzero(changed)],
            )
        )
        label_before, label = self.class_names(here), now.class_names(there)
        found.append(
            _named(
                "with another label",
                [f"{common[i]}: {label[i]}, not {label_before[i]}" for i in np.flatnonzero(label != label_before)],
            )
        )
        both = [index for index in self.digests if index in now.digests]
        other = [self.keys[index] for index in both if self.digests[index] != now.digests[index]]
        found.append(_named("with other pixels", other))
        found = [text for text in found if text]
        if not found and not np.array_equal(here, there):
            first = int(np.flatnonzero(here != there)[0])
            found = [f"the same images in another order (from image {first}, {common[first]}, on)"]
        return found

    def class_names(self, indices: NDArray[np.int64]) -> NDArray[np.object_]:
        """Class name of each of these images, object [len(indices)]; "no label" for none."""
        return np.array([*self.classes, "no label"], dtype=object)[self.labels[indices]]


def _without_folder(names: Sequence[str]) -> list[str]:
    """Names without the folders that all of them are in."""
    folder = os.path.commonpath([os.path.dirname(name) for name in names])
    return [name.removeprefix(folder).lstrip("/") for name in names]


def _named(what: str, examples: Sequence[str]) -> str:
    """ "2 images more (a, b)", with a few examples; "" without any."""
    if not examples:
        return ""
    shown = ", ".join(examples[:_EXAMPLES]) + (", ..." if len(examples) > _EXAMPLES else "")
    return f"{len(examples):,} {'images' if len(examples) > 1 else 'image'} {what} ({shown})"
