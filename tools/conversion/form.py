"""What the conversion asks of the form it writes: tar shards or a .beton file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pipelines.storage.manifest import Shard
from tools.conversion.parts import Part
from tools.conversion.verify import Checked


class Writer(Protocol):
    """Writes one part of the converted data."""

    def add(self, key: str, outcome: Checked, *, label: int) -> int:
        """Append an image and give the byte offset of its data in the file; `label` -1 is none."""

    def finish(self) -> Shard:
        """Sync what was written; from here on it survives a kill."""

    def discard(self) -> None:
        """Give up the part, unless it is finished."""


class Form(Protocol):
    """One way to lay out converted data."""

    def load(self, count: int) -> list[Part | None]:
        """The finished parts of an earlier run, of `count` that are planned; None for those to be written."""

    def suit(self, outcome: Checked) -> Checked:
        """The image as this form can hold it."""

    def writer(self, number: int, before: Sequence[Part | None]) -> Writer:
        """Begin part `number`; `before` are the parts in front of it."""

    def join(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Make one whole of the parts, write the manifest last, and return it.

        Raises:
            InputError: every image is bad.
            OSError: a file cannot be written.
        """

    def describe(self, manifest: dict[str, Any]) -> str:
        """What was written, for the summary: "in 3 shard(s)"."""
