"""Converted data as one .beton file with our index in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.errors import InputError
from pipelines.storage.beton import BetonSource
from pipelines.storage.beton_index import BETON, BetonIndex
from pipelines.storage.keys import KeyTable
from pipelines.storage.manifest import BETON_FORMAT
from tools.conversion.beton_samples import suit_ffcv
from tools.conversion.beton_writer import BetonWriter, check_written, first_page, seal_beton
from tools.conversion.destination import Destination
from tools.conversion.files import rename_into_place, temporary_name
from tools.conversion.joining import Origin, finish, write_lists
from tools.conversion.parts import Part, load_part
from tools.conversion.verify import Checked


class BetonForm:
    """Each part is a stretch of the one file, behind the part before it. Meets the `Form` contract."""

    def __init__(
        self, destination: Destination, origin: Origin, *, capacity: int, page: int, quality: int | None
    ) -> None:
        """Leave room for the records of `capacity` images; `page` bytes are the most of one image."""
        self._destination = destination
        self._origin = origin
        self._start = first_page(capacity, page=page)
        self._page = page
        self._quality = quality
        self._temporary = temporary_name(destination.beton)

    def load(self, count: int) -> list[Part | None]:
        """Finished parts from the first on, up to one that is missing or that the file is too short for."""
        size = self._temporary.stat().st_size if self._temporary.is_file() else 0
        found: list[Part | None] = [None] * count
        for number in range(count):
            part = load_part(self._destination.part(number))
            if part is None or (part.shard is not None and part.shard.bytes > size):
                break
            found[number] = part
        return found

    def suit(self, outcome: Checked) -> Checked:
        """A JPEG of gray or RGB as it is, anything else as pixels; see `suit_ffcv`."""
        return suit_ffcv(outcome, page=self._page, quality=self._quality)

    def writer(self, number: int, before: Sequence[Part | None]) -> BetonWriter:
        """A stretch behind the parts before."""
        del number
        finished = [part for part in before if part is not None]
        count = sum(len(part.rows) for part in finished)
        return BetonWriter(self._temporary, start=self._end(finished), count=count, page=self._page)

    def join(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Read everything back, write index and header, check the whole file, and give it its name."""
        write_lists(self._destination, parts, self._origin)
        for part in parts:
            if part.shard is not None and not check_written(self._temporary, part.rows, part.shard):
                raise InputError(
                    f"{self._temporary} does not give back what was written to it: check the disk, and convert again "
                    "with --overwrite."
                )
        rows = np.concatenate([part.rows for part in parts])
        index = BetonIndex(
            keys=KeyTable.of(key for part in parts for key in part.keys),
            classes=self._origin.classes,
            sizes=np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64),
        )
        seal_beton(self._temporary, end=self._end(parts), page=self._page, nbytes=rows["size"].tolist(), index=index)
        written = BetonSource(self._temporary)
        if len(written) != len(rows) or not np.array_equal(written.labels, rows["label"]):
            raise InputError(f"{self._temporary} is not as it was written: check the disk, and convert again.")
        written.close()
        rename_into_place(self._destination.beton)
        return finish(self._destination, parts, self._origin, form=BETON_FORMAT)

    def describe(self, manifest: dict[str, Any]) -> str:
        """The file's name."""
        return f"in {BETON}"

    def _end(self, parts: Sequence[Part]) -> int:
        """Where the data of these parts ends."""
        return max((part.shard.bytes for part in parts if part.shard is not None), default=self._start)
