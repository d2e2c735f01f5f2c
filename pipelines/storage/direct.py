"""Tars, zips, Parquet and Arrow files as a source, read in place: an index is built once, then images in any order.

``PATH#NAME`` is the split NAME of what PATH holds, as `split_paths` gives it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import ModuleType

from pipelines.names import Url, located
from pipelines.runtime import InputError
from pipelines.storage.beton_format import is_beton_name
from pipelines.storage.direct_index import Entry, Stamps, building, cache_file, described, load_entries, save_entries
from pipelines.storage.file_index import is_data_folder, is_image_name
from pipelines.storage.forms import Found, Request, find_form, open_form
from pipelines.storage.forms.base import FormSource
from pipelines.storage.forms.blobs import packing
from pipelines.storage.forms.look import File, Look, by_split, look_at
from pipelines.storage.forms.parquet import ParquetReader
from pipelines.storage.forms.row_groups import RowGroupReader
from pipelines.storage.image_facts import facts_of
from pipelines.storage.manifest import is_converted
from pipelines.storage.remote_files import RemoteOptions
from pipelines.storage.remote_look import look_at_url
from pipelines.storage.source import Source

_log = logging.getLogger("mvssl.data")
SCANS_FOLDER = True  # an image written into the folder would make it a folder of images
_ENTRIES, _FOLDERS, _BELOW = 512, 4, 64  # looked at before a folder's files are opened


def can_open(path: Path) -> bool:
    """What `mvssl-convert` reads as tars, zips, Parquet, Arrow or another form; neither images nor converted data."""
    return look_for_form(path) is not None


def open_path(path: Path, *, progress: Callable[[int], None] | None = None) -> Source:
    """Open a split in place, with its cached index if there is one.

    Args:
        path: a file, a folder or a pattern such as ``train-{0000..0009}.tar``, or a split of one (``PATH#train``); of
            several splits the train split is opened.
        progress: called with the number of images found so far, if indexing is needed.

    Raises:
        InputError: images of this form cannot be read in any order, or the data are damaged or hold no images.
    """
    asked = look_for_form(path)
    if asked is None:
        raise InputError(f"{path} has changed while it was opened: start again.")
    return _open_split(asked, progress)


def open_url(url: Url, remote: RemoteOptions, *, progress: Callable[[int], None] | None = None) -> Source | None:
    """As `open_path`, of files at a URL; None if there are none of these forms."""
    asked = look_for_form(url, remote)
    return None if asked is None else _open_split(asked, progress)


def _open_split(asked: Asked, progress: Callable[[int], None] | None) -> Source:
    names = asked.by_name()
    wanted = asked.split or ("train" if "train" in names else "")
    if wanted in names:
        asked = replace(asked, look=replace(asked.look, files=tuple(names[wanted])))
    splits = _opened(asked, wanted if wanted in names else "", progress)
    if len(splits) == 1 and (not asked.split or asked.split in names):
        return next(iter(splits.values()))
    if (wanted or "train") not in splits:
        raise _no_split(asked.base, list(splits) if len(names) == 1 else list(names), asked.split)
    return splits[wanted or "train"]


def split_paths(path: Path, *, remote: RemoteOptions | None = None) -> tuple[Path, Path | None] | None:
    """Paths (train, val) of the splits of what is read in place; None of other data.

    Splits are said by the names of files or of folders in archives. Without a val split, a labelled test split is the
    one to measure on, as after conversion.

    Raises:
        InputError: there are several splits, and none is train; or as `open_path`.
    """
    asked = look_for_form(path, remote)
    if asked is None:
        return None
    if asked.split:
        return path, None
    named = asked.by_name()
    names = list(named) if len(named) > 1 else list(_opened(asked, "", None))
    if len(names) < 2:
        return path, None
    if "train" not in names:
        raise _no_split(path, names, "")
    val = "val" if "val" in names else None
    if val is None and "test" in names and _open_split(replace(asked, split="test"), None).classes:
        val = "test"
    return located(f"{path}#train"), None if val is None else located(f"{path}#{val}")


def base_of(path: Path) -> Path:
    """The path without the name of a split."""
    return _parted(path)[0]


def _no_split(path: Path, names: Sequence[str], split: str) -> InputError:
    found = list(filter(None, names))
    if not found:
        text = f"data is '{path}#{split}', which is no split of {path}, but must be all of it: leave out #{split}."
        return InputError(text, field="data")
    wanted = f"the split {split}" if split else "a train split, or one split alone"
    return InputError(
        f"data is {str(path)!r}, which has the splits {', '.join(found)} but must have {wanted}: choose one, such as "
        f"'{path}#{found[0]}'.",
        field="data",
    )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a path names: files, their form, and a split ("" for none)."""

    base: Path
    split: str
    look: Look
    form: ModuleType

    def by_name(self) -> dict[str, list[File]]:
        """Files by the split that their names say; all as "" of a form that says its splits itself."""
        self.check(in_place=True)
        saved = any(name.rpartition("/")[2] == "state.json" for name in self.look.texts)
        files = self.form.files_of(self.look)
        return {"": files} if saved else by_split(self.look, files)

    def check(self, *, in_place: bool) -> None:
        """Raise InputError if this form cannot be read at a URL, or (`in_place`) its images not in any order."""
        name = self.form.__name__.rpartition(".")[2]
        convert = f"convert it once (mvssl-convert {self.base} DST) and give DST"
        if isinstance(self.base, Url) and getattr(self.form, "LOCAL_ONLY", False):
            raise InputError(
                f"data is {str(self.base)!r}, which holds data of the form {name.removesuffix('_form')} but must be "
                "converted data, tars, zips or Parquet at a URL: download it.",
                field="data",
            )
        if not in_place:
            return
        if not hasattr(self.form, "files_of"):
            raise InputError(
                f"data is {str(self.base)!r}, which holds data of the form {name.removesuffix('_form')} but must be "
                f"images, tars, stored zips, Parquet, Arrow files or converted data: {convert}.",
                field="data",
            )
        packed = [file for file in self.form.files_of(self.look) if packing(file)]
        if packed:
            raise InputError(
                f"data is {str(packed[0].path)!r}, a compressed tar, but must be a plain one, in which images are read "
                f"in any order: {convert}, or unpack it to a plain tar.",
                field="data",
            )


def _parted(path: Path) -> tuple[Path, str]:
    head, mark, split = str(path).rpartition("#")
    if isinstance(path, Url) or not path.exists():
        return (located(head), split) if mark and head and "/" not in split else (path, "")
    return path, ""


def look_for_form(path: Path, remote: RemoteOptions | None = None) -> Asked | None:
    """What a path or URL names; None if it is of no form, a folder of images, or converted data."""
    base, split = _parted(path)
    if isinstance(base, Url):
        look = look_at_url(base, remote or RemoteOptions())
        form = None if look is None or not look.files else find_form(look)
        return None if look is None or form is None else Asked(base=base, split=split, look=look, form=form)
    if base.is_dir() and (_holds_images(base) or is_converted(base)):
        return None
    if is_beton_name(base):
        return None
    look = look_at(base)
    form = None if look is None or not look.files else find_form(look)
    if look is None or form is None:
        return None
    if any(map(is_converted, {file.path.parent for file in look.files})):  # converted splits in a folder
        return None
    return Asked(base=base, split=split, look=look, form=form)


def _holds_images(folder: Path) -> bool:
    """Whether image files are among the first ones of a folder or of its first folders."""
    with os.scandir(folder) as entries:
        first = list(islice(entries, _ENTRIES))
    if any(is_image_name(entry.name) for entry in first):
        return True
    for below in islice(filter(is_data_folder, first), _FOLDERS):
        try:
            with os.scandir(below.path) as entries:
                if any(is_image_name(entry.name) for entry in islice(entries, _BELOW)):
                    return True
        except OSError:  # reading it as data names it
            continue
    return False


def _opened(asked: Asked, split: str, progress: Callable[[int], None] | None) -> dict[str, Source]:
    """The splits in the files of `asked`, which are all or those of the split that their names say."""
    asked.check(in_place=True)
    stamps = Stamps.of([file.path for file in asked.look.files])
    cache = cache_file(asked.base, split)
    entries = load_entries(cache, stamps)
    if entries is not None:
        return {name: entry.source(asked.base, stamps) for name, entry in entries.items()}
    with building(cache):  # ranks on this host wait for the first one
        entries = load_entries(cache, stamps)
        if entries is not None:
            return {name: entry.source(asked.base, stamps) for name, entry in entries.items()}
        if cache.exists():
            _log.info("%s is indexed again, because its files changed since the last time", asked.base)
        form = _read_form(asked, progress)
        found, what = form.splits, form.what
        entries = {n: entry for n, source in found.items() if (entry := _entry(source, stamps, what)) is not None}
        if len(entries) < len(found):
            for source in found.values():
                facts_of(source).notes += (described(asked.base, len(source), what),)
            return dict(found)
        save_entries(cache, stamps, entries, where=asked.base)
    for source in found.values():
        source.close()
    return {name: entry.source(asked.base, stamps) for name, entry in entries.items()}


def _read_form(asked: Asked, progress: Callable[[int], None] | None) -> Found:
    """Open the form; errors that ask for an option of mvssl-convert say so."""
    try:
        return open_form(asked.form, asked.look, Request(progress=progress))
    except InputError as error:
        option = re.search(r"--(image|label) [^\s,;]*[\w]", str(error))
        if option is None:
            raise
        text = str(error).rstrip(".")
        raise InputError(
            f"{text}, with mvssl-convert {asked.base} DST {option[0]}, and give DST.", field="data"
        ) from None


def _entry(source: Source, stamps: Stamps, what: str) -> Entry | None:
    """The index of a source that was read from files; None if it has to be read through the form's reader."""
    if not isinstance(source, FormSource):
        return None
    ranges = source.ranges()
    if ranges is not None:
        return Entry.of_ranges(source, ranges, stamps, what=what)
    if isinstance(source.reader, ParquetReader):
        reader = source.reader
        groups = RowGroupReader(reader.groups, reader.rows, reader.columns, reader.spans)
        return Entry.of_row_groups(source, groups, stamps, what=what)
    return None
