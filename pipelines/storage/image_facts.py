"""What is known of a source's images besides their bytes: damage, the range of their values, limits."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pipelines.decode.limits import ImageLimits
from pipelines.value_range import ValueRange


@dataclass(kw_only=True, eq=False)
class ImageFacts:
    """Facts about the images of a source; they live as long as the source, over epochs and evaluations.

    Attributes:
        examined: bool [len], whether an image has been examined for damage.
        damage: dataset index -> damage of images that decode nevertheless, as far as examined.
        named: indices of damaged images that the log has named.
        checksums: uint32 [len], CRC-32 of what `read` returns; None if they were not recorded.
        value_range: of images with more than 8 bits; None if it is not known.
        limits: images beyond them are neither read nor decoded.
        digests: dataset index -> hash of the content of some images, where names and sizes do not tell data apart.
        notes: what the user should know of the data.
        exact_sizes: whether `nbytes` of the source are those of the images, and not estimated from sums.
    """

    examined: npt.NDArray[np.bool_]
    damage: dict[int, str] = field(default_factory=dict)
    named: set[int] = field(default_factory=set)
    checksums: npt.NDArray[np.uint32] | None = None
    value_range: ValueRange | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)
    digests: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exact_sizes: bool = True

    @classmethod
    def of(
        cls,
        count: int,
        *,
        damage: Mapping[int, str] | None = None,
        checksums: npt.NDArray[np.uint32] | None = None,
        value_range: ValueRange | None = None,
        exact_sizes: bool = True,
    ) -> ImageFacts:
        """Facts of `count` images; `damage` and `checksums` of all of them, None if they are not known."""
        return cls(
            examined=np.full(count, damage is not None),
            damage=dict(damage or {}),
            checksums=checksums,
            value_range=value_range,
            exact_sizes=exact_sizes,
        )

    def subset(self, indices: npt.NDArray[np.int64]) -> ImageFacts:
        """Facts of the images at these indices, int64 [M], as they are now."""
        damage = {n: self.damage[index] for n, index in enumerate(indices.tolist()) if index in self.damage}
        named = {n for n in damage if int(indices[n]) in self.named}
        digests = {n: self.digests[index] for n, index in enumerate(indices.tolist()) if index in self.digests}
        return ImageFacts(
            examined=self.examined[indices],
            damage=damage,
            named=named,
            checksums=None if self.checksums is None else self.checksums[indices],
            value_range=self.value_range,
            limits=self.limits,
            digests=digests,
            notes=self.notes,
            exact_sizes=self.exact_sizes,
        )


@runtime_checkable
class HasFacts(Protocol):
    """A source that keeps facts about its images."""

    @property
    def facts(self) -> ImageFacts:
        """The same object at every call."""


def facts_of(source: Sized) -> ImageFacts:
    """The facts that `source` keeps, or new ones if it keeps none."""
    return source.facts if isinstance(source, HasFacts) else ImageFacts.of(len(source))
