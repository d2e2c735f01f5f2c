"""Parquet files with a column of images, as dataset hubs have them."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import open_regular, read_regular
from pipelines.names import Url
from pipelines.runtime import InputError
from pipelines.storage.file_index import begins_as_image
from pipelines.storage.forms.base import (
    ROWS_KEPT,
    FormSource,
    Found,
    Labels,
    Request,
    counted,
    need,
    number_labels,
    unlabelled,
    unreadable,
)
from pipelines.storage.forms.blobs import largest_unpacked
from pipelines.storage.forms.columns import LOOKED_AT, Columns, find_columns, image_columns, labels_of
from pipelines.storage.forms.look import File, Look, by_split
from pipelines.storage.remote_objects import RemoteObject

_MAGIC = b"PAR1"
_BATCH = 64  # rows decoded at a time
_BUFFER = 1 << 20  # bytes
_LARGEST_FILE = 1 << 32  # bytes of an image that a row names


def recognise(look: Look) -> bool:
    """Whether a file begins as Parquet does, or has its name."""
    return bool(_candidates(look))


def _candidates(look: Look) -> list[File]:
    """Files of this form, without the tables that img2dataset writes beside its tars."""
    tars = {file.name.removesuffix(".tar") for file in look.files if file.name.endswith(".tar")}
    found = [file for file in look.files if file.head.startswith(_MAGIC) or file.name.lower().endswith(".parquet")]
    return [file for file in found if file.name.removesuffix(".parquet") not in tars]


def files_of(look: Look) -> list[File]:
    """The files of this form."""
    found = _candidates(look)
    files = [file for file in found if file.head.startswith(_MAGIC)]
    broken = [file for file in found if file not in files]
    if broken:
        raise InputError(f"{broken[0].path} does not begin as a Parquet file: download it again.")
    return files


def open_form(look: Look, request: Request) -> Found:
    """Open the splits that the names of the files say."""
    splits, what = {}, ""
    files = files_of(look)
    for name, of_split in by_split(look, files).items():
        source, columns = open_files(look.path, of_split, request)
        splits[name], what = source, str(columns)
    return Found(what=f"{counted(len(files), 'Parquet file')} ({what})", splits=splits)


def open_files(location: Path, files: Sequence[File], request: Request) -> tuple[FormSource, Columns]:
    """A source over the rows of several files, in order.

    Raises:
        InputError: a file is truncated or damaged, has no images, or has other columns than the first.
    """
    pq = need("pyarrow.parquet", "Reading Parquet")
    groups: list[tuple[Path, int]] = []  # file and number in it
    rows: list[int] = []
    spans: list[tuple[int, int]] = []
    sizes: list[np.ndarray] = []
    keys: list[str] = []
    values: list[Any] = []
    columns: Columns | None = None
    first: Any = None
    deep: list[int] | None = []
    for file in files:
        with (
            naming_parquet(file.path),
            pq.ParquetFile(readable(file.path), pre_buffer=False, buffer_size=_BUFFER) as opened,
        ):
            _check_numbers(opened.metadata, file)
            schema = opened.schema_arrow
            if columns is None and not opened.metadata.num_rows and file is not files[-1]:
                continue  # Spark writes such files; they do not tell which column holds the images
            if columns is None:
                columns = find_columns(
                    schema, where=file.path, request=request, heads=_heads(opened, schema, file.path.parent)
                )
                first = schema
            _check_same(columns, first, schema, files[0].path, file.path)
            start = len(keys)
            leaf = _leaf_number(opened, columns.leaf)
            for number in range(opened.num_row_groups):
                group = opened.metadata.row_group(number)
                if group.num_rows:
                    groups.append((file.path, number))
                    spans.append(_span(group, columns.image))
                    rows.append(group.num_rows)
                    mean = -(-group.column(leaf).total_uncompressed_size // group.num_rows)
                    sizes.append(np.full(group.num_rows, mean, dtype=np.int64))
            count = opened.metadata.num_rows
            paths = opened.read([f"{columns.image}.path"]).column(0).to_pylist() if columns.has_path else []
            stem = file.name.rpartition(".")[0] or file.name
            for row in range(count):
                path = (paths[row] or {}).get("path") if paths else None
                keys.append(path.lstrip("/") if path else f"{stem}/{row:08d}")
                if not path:
                    deep = None
            if columns.label is not None and count:
                values.append(opened.read([columns.label]).column(0))
                if len(values[-1]) != count:
                    raise _lying(file.path, f"it says {count:,} rows and has {len(values[-1]):,} labels")
            if start != len(keys):
                request.report(len(keys))
    assert columns is not None
    if not keys:
        raise InputError(f"{files[0].path} has no rows: give files with images.")
    if deep is not None:
        deep = [index for index, key in enumerate(keys) if may_be_deep_name(key)]
    source = FormSource(
        location,
        keys=keys,
        labels=_labels(columns, values, len(keys), files[0].path),
        nbytes=np.concatenate(sizes),
        reader=ParquetReader(groups, rows, columns, spans),
        deep=deep,
        largest=max(int(size[0]) * len(size) for size in sizes),
    )
    return source, columns


def _check_numbers(metadata: Any, file: File) -> None:
    """Check rows and sizes that the end of a file says, before memory is used for them."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or not sum(rows) == metadata.num_rows <= file.size:
        raise _lying(file.path, f"it says {metadata.num_rows:,} rows in {file.size:,} bytes")
    for column in (group.column(number) for group in groups for number in range(group.num_columns)):
        packed, size = column.total_compressed_size, column.total_uncompressed_size
        if not 0 <= size <= largest_unpacked(min(packed, file.size)):
            name = column.path_in_schema
            raise _lying(file.path, f"{name} would unpack from {packed:,} to {size:,} bytes in a row group")


def _lying(path: Path, why: str) -> InputError:
    return InputError(f"{path} is truncated or damaged ({why}): download it again.")


def may_be_deep_name(name: str) -> bool:
    """Whether an image of this name may have more than 8 bits."""
    from pipelines.decode.pillow import DEEP_ENDINGS

    return "." not in name.rpartition("/")[2] or name.lower().endswith(tuple(DEEP_ENDINGS))


def _labels(columns: Columns, values: Sequence[Any], count: int, where: Path) -> Labels:
    if columns.label is None:
        return unlabelled(count)
    if len(values) == 1:
        return labels_of(columns, values[0], where=where)
    if any("dictionary" in str(one.type) or "string" in str(one.type) for one in values):
        return number_labels([v for one in values for v in one.to_pylist()], where=where, names=columns.names)
    pa = need("pyarrow", "Reading Parquet")
    return labels_of(columns, pa.chunked_array([c for one in values for c in one.chunks]), where=where)


def _heads(opened: Any, schema: Any, folder: Path) -> dict[str, list[bytes]]:
    """First bytes of some values of each column that may hold images."""
    names = image_columns(schema)
    if not names or not opened.metadata.num_rows:
        return {}
    batch = next(opened.iter_batches(batch_size=LOOKED_AT, columns=names), None)
    return {} if batch is None else {name: first_bytes(batch.column(name), folder) for name in names}


def first_bytes(values: Any, folder: Path) -> list[bytes]:
    """First bytes of some values of an array of bytes, or of structs with `bytes`, or of the files below `folder`."""
    struct = str(values.type).startswith("struct")
    data = values.field("bytes") if struct else values
    found = [one.as_buffer()[:64].to_pybytes() for one in data[:LOOKED_AT] if one.is_valid and one.as_buffer().size]
    if not found and struct and values.type.get_field_index("path") >= 0:
        for one in values.field("path").slice(0, LOOKED_AT).to_pylist():
            path = None if not one else _named(one, folder)
            if path is not None and path.is_file():
                with open_regular(path) as file:
                    found.append(file.read(64))
    return found


def _span(group: Any, image: str) -> tuple[int, int]:
    """First byte and end of the images of a row group in its file."""
    chunks = [group.column(n) for n in range(group.num_columns)]
    parts = [
        (chunk.dictionary_page_offset or chunk.data_page_offset, chunk.total_compressed_size)
        for chunk in chunks
        if chunk.path_in_schema == image or chunk.path_in_schema.startswith(f"{image}.")
    ]
    return min((start for start, _ in parts), default=0), max((start + size for start, size in parts), default=0)


def readable(path: Path) -> Any:
    """What Arrow reads a file from: its path, or what reads it at its URL."""
    return path.reader() if isinstance(path, RemoteObject) else path


def _leaf_number(opened: Any, path: str) -> int:
    group = opened.metadata.row_group(0) if opened.num_row_groups else None
    names = [] if group is None else [group.column(n).path_in_schema for n in range(group.num_columns)]
    return names.index(path) if path in names else 0


def _check_same(columns: Columns, first: Any, schema: Any, first_path: Path, path: Path) -> None:
    """Check that a file has the columns of the first file, of the same types."""
    for name in filter(None, (columns.image, columns.label)):
        at = schema.get_field_index(name)
        found = "is missing" if at < 0 else f"is {schema.field(at).type}"
        if at < 0 or schema.field(at).type != first.field(name).type:
            raise InputError(
                f"{path} has another schema than {first_path}: the column {name!r} {found} and not "
                f"{first.field(name).type}; give files of one data set."
            )


@contextmanager
def naming_parquet(path: Path) -> Iterator[None]:
    """Name the file in errors of Arrow."""
    pa = need("pyarrow", "Reading Parquet")
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, pa.ArrowException):
            raise
        text = str(error).split("\n")[0].rstrip(". ")[:200]
        raise InputError(
            f"{path} is truncated or damaged, or compressed in a way that cannot be read ({text}): download it again."
        ) from None


class ParquetReader:
    """Reads images by row. Batches of rows are decoded in order and the last ones kept: neighbours cost one read."""

    def __init__(
        self,
        groups: Sequence[tuple[Path, int]],
        rows: Sequence[int],
        columns: Columns,
        spans: Sequence[tuple[int, int]],
    ) -> None:
        self.groups, self.rows, self.columns, self.spans = groups, rows, columns, spans
        self._ends = np.cumsum(rows).tolist()
        self._lock = threading.Lock()
        self._at: tuple[int, int] = (-1, 0)  # group, next row
        self._batches: Iterator[Any] = iter(())
        self._opened: Any = None
        self._kept: dict[tuple[int, int], Any] = {}  # (group, first row) -> array of bytes, in the order of reading

    def read(self, row: int) -> Any:
        """See `Reader`."""
        group = bisect.bisect_right(self._ends, row)
        inside = row - (self._ends[group - 1] if group else 0)
        with self._lock:
            values = self._batch(group, inside // _BATCH * _BATCH)
        value = values[inside % _BATCH]
        if self.columns.is_struct:
            path = value.get("path") if self.columns.has_path and value.is_valid else None
            value = value["bytes"] if value.is_valid else value
            if not value.is_valid and path is not None and path.is_valid:
                return read_path(path.as_py(), self.groups[group][0].parent)
        if not value.is_valid:
            raise unreadable("its row has no image")
        return np.frombuffer(value.as_buffer(), np.uint8)

    def _batch(self, group: int, start: int) -> Any:
        """The rows from `start` on; under the lock."""
        found = self._kept.get((group, start))
        if found is not None:
            return found
        if group != self._at[0] or start < self._at[1]:
            self._open(group)
        path = self.groups[group][0]
        while True:
            with naming_parquet(path):
                batch = next(self._batches, None)
            if batch is None:
                raise InputError(f"{path} has fewer rows than its index says: download it again.")
            first = self._at[1]
            self._at = (group, first + len(batch))
            self._kept[group, first] = batch.column(self.columns.image)
            while len(self._kept) > ROWS_KEPT // _BATCH:
                del self._kept[next(iter(self._kept))]
            if first == start:
                return self._kept[group, first]

    def _open(self, group: int) -> None:
        pq = need("pyarrow.parquet", "Reading Parquet")
        path, number = self.groups[group]
        names = [self.columns.leaf, *([f"{self.columns.image}.path"] if self.columns.has_path else [])]
        with naming_parquet(path):
            if self._opened is None or self._opened[0] != path:
                self.close()
                self._opened = (path, pq.ParquetFile(readable(path), pre_buffer=False, buffer_size=_BUFFER))
            self._batches = self._opened[1].iter_batches(batch_size=_BATCH, row_groups=[number], columns=names)
        self._at = (group, 0)

    def close(self) -> None:
        """See `Reader`."""
        if self._opened is not None:
            path, opened = self._opened
            opened.close()
            if isinstance(path, RemoteObject):
                path.release()
            self._opened = None


def read_path(text: str, folder: Path) -> Any:
    """The file that a row names instead of holding bytes."""
    path = _named(text, folder)
    if path is None or not path.is_file():
        raise unreadable(f"its row has no bytes, and the file {text} that it names does not exist")
    try:
        data = np.frombuffer(read_regular(path, most=_LARGEST_FILE), np.uint8)
    except ValueError as error:
        raise unreadable(f"its row has no bytes, and of the file {text} that it names {error}") from None
    if not begins_as_image(data[:64].tobytes()):  # rows of others may name any file
        raise unreadable(f"its row has no bytes, and the file {text} that it names is no image")
    return data


def _named(text: str, folder: Path) -> Path | None:
    """The file that a row names: an absolute path, as `datasets` writes it, or one below the folder; else None."""
    if isinstance(folder, Url) or "\0" in text or (not Path(text).is_absolute() and ".." in Path(text).parts):
        return None
    return folder / text
