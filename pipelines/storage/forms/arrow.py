"""Arrow files: folders that `datasets` saved to disk, its cache, and files of Arrow's own formats."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import open_regular, read_json
from pipelines.runtime import InputError
from pipelines.storage.forms.base import (
    FormSource,
    Found,
    Labels,
    Ranges,
    Request,
    counted,
    need,
    unlabelled,
    unreadable,
)
from pipelines.storage.forms.blobs import largest_unpacked
from pipelines.storage.forms.columns import Columns, find_columns, image_columns, labels_of
from pipelines.storage.forms.look import File, Look, by_split, split_of
from pipelines.storage.forms.parquet import first_bytes, may_be_deep_name, read_path

_FILE, _STREAM = b"ARROW1", b"\xff\xff\xff\xff"
_FIRST = 8  # byte of the stream in a file
_STATE = "state.json"
LOCAL_ONLY = True  # its library maps files of a disk


def recognise(look: Look) -> bool:
    """Whether a file is an Arrow file or stream."""
    return bool(files_of(look))


def files_of(look: Look) -> list[File]:
    """The files of this form."""
    # A stream begins with a marker and the length of the schema, which names its fields.
    streams = [f for f in look.starting(_STREAM) if 0 < int.from_bytes(f.head[4:8], "little") < 1 << 26]
    found = [*look.starting(_FILE), *streams]
    own = [file for file in found if not Path(file.name).name.startswith(("cache-", "indices-"))]
    return sorted(own, key=lambda file: file.name)


def open_form(look: Look, request: Request) -> Found:
    """Open the splits: folders of a saved `DatasetDict`, or those that the names of the files say."""
    files = files_of(look)
    states = {Path(name).parent.as_posix(): path for name, path in look.texts.items() if Path(name).name == _STATE}
    groups: dict[str, list[File]] = {}
    indices: dict[str, np.ndarray] = {}
    if states:
        for folder, path in states.items():
            name = "" if folder == "." and len(states) == 1 else split_of(folder) or Path(folder).name
            groups[name], rows = _of_state(path, files)
            if rows is not None:
                indices[name] = rows
    else:
        groups = by_split(look, files)
    splits, what = {}, ""
    for name, of_split in groups.items():
        splits[name], columns = _open(look.path, of_split, request, indices.get(name))
        what = str(columns)
    kind = "a data set that `datasets` saved" if states else counted(len(files), "Arrow file")
    return Found(what=f"{kind} ({what})", splits=splits)


def _of_state(path: Path, files: Sequence[File]) -> tuple[list[File], np.ndarray | None]:
    """The files of a saved data set in its order, and the rows that it selects."""
    try:
        state = read_json(path)
        names = [_name(entry["filename"]) for entry in state["_data_files"]]
        selected = [_name(entry["filename"]) for entry in state.get("_indices_data_files") or ()]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no state of a saved data set ({error!r}): save it again.") from None
    known = {file.path: file for file in files}
    missing = [name for name in names if path.parent / name not in known]
    if missing:
        raise InputError(f"{path} names {missing[0]}, which is missing or no Arrow file: copy the whole folder again.")
    if not selected:
        return [known[path.parent / name] for name in names], None
    rows = [np.asarray(b.column(0)) for name in selected for b in _batches(path.parent / name)[1] if b.num_columns]
    if not rows or any(one.dtype.kind not in "iu" for one in rows):
        raise InputError(f"{path} names {selected[0]}, which holds no numbers of rows: copy the whole folder again.")
    return [known[path.parent / name] for name in names], np.concatenate(rows).astype(np.int64)


def _name(text: Any) -> str:
    """A file name in a state; ValueError if it leads elsewhere."""
    if not isinstance(text, str) or Path(text).name != text:
        raise ValueError(f"it names the file {text!r:.200}")
    return text


def _batches(path: Path) -> tuple[Any, list[Any], Any]:
    """Schema and record batches of a file, which stay on disk, and the whole mapped file."""
    pa = need("pyarrow", "Reading Arrow files")
    try:
        open_regular(path).close()
        memory = pa.memory_map(str(path))
        is_file = memory.read(len(_FILE)) == _FILE
        memory.seek(0)
        count = pa.ipc.open_file(memory).num_record_batches if is_file else None
        memory.seek(_FIRST if is_file else 0)  # a file holds a stream
        check_unpacked(memory, memory.size())
        memory.seek(_FIRST if is_file else 0)
        reader = pa.ipc.open_stream(memory)
        _ = [field.name for field in reader.schema]  # those that are no UTF-8 raise here
        batches = list(reader)
        if count not in (None, len(batches)):
            raise ValueError(f"it says {count} batches and holds {len(batches)}")
        for batch in batches:
            batch.validate(full=True)  # offsets that lie would end the process; values are not read
        memory.seek(0)
        return reader.schema, batches, memory.read_buffer()
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        text = str(error).split("\n")[0].rstrip(". ")[:200]
        raise InputError(f"{path} is truncated or damaged ({text}): copy or download it again.") from None


def check_unpacked(memory: Any, size: int) -> None:
    """Check that the compressed values of a stream's messages would not unpack to far more than it is; ValueError."""
    pa, total = need("pyarrow", "Reading Arrow files"), 0
    while True:
        try:
            message = pa.ipc.read_message(memory)
        except EOFError:
            return
        data, at = message.metadata.to_pybytes(), 0
        header = _field(data, struct.unpack_from("<I", data)[0], 2)
        if message.type == "dictionary" and header is not None:
            header = _field(data, header, 1)
        if message.type in ("record batch", "dictionary") and header is not None and _field(data, header, 3):
            buffers = _field(data, header, 2) or 0
            for at in range(buffers + 4, buffers + 4 + 16 * struct.unpack_from("<I", data, buffers)[0], 16):
                offset, length = struct.unpack_from("<2q", data, at)
                total += max(0, struct.unpack_from("<q", message.body, offset)[0]) if length >= 8 else 0
        if total > largest_unpacked(size):
            raise ValueError(f"it would unpack from {size:,} to {total:,} bytes")


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a FlatBuffers table leads that is a table or vector; None if it is missing."""
    entries = table - struct.unpack_from("<i", data, table)[0]
    entry = 4 + 2 * number
    (offset,) = (
        struct.unpack_from("<H", data, entries + entry) if entry < struct.unpack_from("<H", data, entries)[0] else (0,)
    )
    return table + offset + struct.unpack_from("<I", data, table + offset)[0] if offset else None


def _open(
    location: Path, files: Sequence[File], request: Request, rows: np.ndarray | None
) -> tuple[FormSource, Columns]:
    columns: Columns | None = None
    first: Any = None
    arrays: list[Any] = []
    labels: list[Any] = []
    sizes: list[np.ndarray] = []
    keys: list[str] = []
    wholes: list[tuple[Path, Any]] = []  # file of each array
    named = True
    for file in files:
        schema, batches, whole = _batches(file.path)
        if columns is None:
            heads = {
                name: [head for batch in batches[:4] for head in first_bytes(batch.column(name), file.path.parent)]
                for name in image_columns(schema)
            }
            columns, first = find_columns(schema, where=file.path, request=request, heads=heads), schema
        for name in filter(None, (columns.image, columns.label)):
            at = schema.get_field_index(name)
            if at < 0 or schema.field(at).type != first.field(name).type:
                raise InputError(
                    f"{file.path} has another schema than {files[0].path}: the column {name!r} is missing or of "
                    "another type; give files of one data set."
                )
        stem, row = Path(file.name).stem, 0
        for batch in batches:
            images = batch.column(columns.image)
            data = images.field("bytes") if columns.is_struct else images
            paths = images.field("path").to_pylist() if columns.has_path else [None] * len(images)
            for path in paths:
                named = named and bool(path)
                keys.append(Path(path).name if path else f"{stem}/{row:08d}")
                row += 1
            arrays.append(images)
            wholes.append((file.path, whole))
            sizes.append(_lengths(data))
            if columns.label is not None:
                labels.append(batch.column(columns.label))
        request.report(len(keys))
    if columns is None or not keys:
        raise InputError(f"{location} has no rows: give data with images.")
    pa = need("pyarrow", "Reading Arrow files")
    found: Labels = unlabelled(len(keys))
    if columns.label is not None:
        found = labels_of(columns, pa.chunked_array(labels), where=files[0].path)
    nbytes = np.concatenate(sizes)
    if rows is not None:
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(keys):
            raise InputError(f"{location} selects rows that it does not have: save the data set again.")
        keys = [keys[row] for row in rows.tolist()]
        found, nbytes = Labels(values=found.values[rows], classes=found.classes), nbytes[rows]
    source = FormSource(
        location,
        keys=keys,
        labels=found,
        nbytes=nbytes,
        reader=ArrowReader(arrays, wholes, columns),
        rows=rows,
        deep=[index for index, key in enumerate(keys) if may_be_deep_name(key)] if named else None,
    )
    return source, columns


def _lengths(data: Any) -> np.ndarray:
    """Bytes of each value, int64; 0 for none."""
    pc = need("pyarrow.compute", "Reading Arrow files")
    return np.asarray(pc.fill_null(pc.binary_length(data), 0)).astype(np.int64)


def _place(data: Any, whole: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Offsets in the mapped file and sizes of an array of bytes, int64 [N]; None if they do not lie there."""
    kinds = {"binary": np.int32, "large_binary": np.int64}
    if data.null_count or str(data.type) not in kinds or not len(data):
        return None if len(data) else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    _, ends, values = data.buffers()
    bounds = np.frombuffer(ends, kinds[str(data.type)])[data.offset : data.offset + len(data) + 1].astype(np.int64)
    start = (values.address if values is not None else whole.address) - whole.address
    if start < 0 or start + bounds[-1] > whole.size:
        return None
    return start + bounds[:-1], np.diff(bounds)


class ArrowReader:
    """Reads images by row out of mapped files."""

    def __init__(self, arrays: Sequence[Any], wholes: Sequence[tuple[Path, Any]], columns: Columns) -> None:
        self._arrays = list(arrays)
        self._wholes = wholes
        self._ends = np.cumsum([len(array) for array in arrays]).tolist()
        self._columns = columns

    def read(self, row: int) -> Any:
        """See `Reader`."""
        at = bisect.bisect_right(self._ends, row)
        value = self._arrays[at][row - (self._ends[at - 1] if at else 0)]
        if self._columns.is_struct and value.is_valid:
            path = value["path"] if self._columns.has_path else None
            value = value["bytes"]
            if not value.is_valid and path is not None and path.is_valid:
                return read_path(path.as_py(), self._wholes[at][0].parent)
        if not value.is_valid:
            raise unreadable("its row has no image")
        return np.frombuffer(value.as_buffer(), np.uint8)

    def ranges(self) -> Ranges | None:
        """See `HasRanges`; None if values are missing or compressed."""
        paths = tuple(dict.fromkeys(path for path, _ in self._wholes))
        files, offsets, sizes = [], [], []
        for array, (path, whole) in zip(self._arrays, self._wholes, strict=True):
            place = _place(array.field("bytes") if self._columns.is_struct else array, whole)
            if array.null_count or place is None:
                return None
            offsets.append(place[0])
            sizes.append(place[1])
            files.append(np.full(len(array), paths.index(path), dtype=np.int64))
        return Ranges(
            paths=paths, file=np.concatenate(files), offset=np.concatenate(offsets), size=np.concatenate(sizes)
        )

    def close(self) -> None:
        """See `Reader`."""
