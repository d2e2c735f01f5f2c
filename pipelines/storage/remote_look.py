"""Finds the files of a data set at a URL: of a folder, a pattern, or one file."""

from __future__ import annotations

import re

from pipelines.names import Url, located
from pipelines.runtime import InputError
from pipelines.storage.file_index import is_image_name
from pipelines.storage.forms.look import HEAD, NO_DATA, File, Look, expand_braces
from pipelines.storage.remote_files import Missing, Refused, RemoteOptions
from pipelines.storage.remote_objects import RemoteObjects

_FILE = re.compile(r"\.(tar|tgz|gz|bz2|xz|zst|parquet|pq|zip|arrow|beton|tfrecord|h5|hdf5|mdb)$", re.IGNORECASE)
_REMEDY = "give the URL of such files, a pattern in quotes, or a folder that the server lists"


def names_files(url: Url) -> bool:
    """Whether a URL is a pattern or has the name of a file, so that it is no folder."""
    text, mark, _ = str(url).partition("?")
    return bool(mark) or any(sign in text for sign in "{*") or _FILE.search(text) is not None


def look_at_url(url: Url, options: RemoteOptions) -> Look | None:
    """What is at a URL, of which each file's size, version and first bytes are asked for; None if nothing is.

    Raises:
        InputError: files that are named do not exist, or the server does not answer.
    """
    if not names_files(url):
        store = RemoteObjects(url, options)
        listed = store.remote.listing()
        return _of_names(store, url, _with_data(listed, url), listed)
    texts = list(dict.fromkeys(expand_braces(str(url))))
    folders = [_folder(text) for text in texts]
    root = located(_common(folders))
    if not isinstance(root, Url) or not str(root).partition("://")[2]:
        raise InputError(
            f"data is {str(url)!r} but must be files of one server: give its name, and a pattern of files."
        )
    store = RemoteObjects(root, options)
    listed = {}
    names: dict[str, None] = {}
    missing = []
    for text, folder in zip(texts, folders, strict=True):
        name = text[len(str(root)) + 1 :]
        if "*" not in text.partition("?")[0]:
            names[name] = None
            continue
        listed.update(store.remote.listing(folder[len(str(root)) + 1 :]))
        pattern = re.compile("[^/]*".join(map(re.escape, name.split("*"))))
        matches = [one for one in sorted(listed) if pattern.fullmatch(one)]
        names.update(dict.fromkeys(matches))
        missing.extend([] if matches else [text])
    if missing:
        raise InputError(
            f"{missing[0]} names no file that its server lists: correct the pattern, or use {{0000..0009}}."
        )
    return _of_names(store, root, list(names), listed)


def _of_names(store: RemoteObjects, root: Url, names: list[str], listed: dict[str, dict[str, str]]) -> Look | None:
    if not names:
        return None
    try:
        paths = store.objects(sorted(names), listed)
    except Refused:
        raise
    except Missing as error:
        if len(names) == 1:
            raise
        raise InputError(f"{len(names)} files are named, of which not all exist: {error}") from error
    heads = store.heads(paths, HEAD)
    start = len(str(root)) + 1
    files = [
        File(path=path, name=path.plain[start:], size=path.size, head=head)
        for path, head in zip(paths, heads, strict=True)
    ]
    return Look(path=root, files=tuple(files), is_folder=True)


def _with_data(listed: dict[str, dict[str, str]], url: Url) -> list[str]:
    """The files that may hold images."""
    parts = [name.split("/") for name in listed]
    names = ["/".join(part) for part in parts if not any(one.startswith(".") for one in part)]
    images = [name for name in names if is_image_name(name)]
    if images:
        raise InputError(
            f"data is {str(url)!r}, which holds image files ({images[0]}) but must be converted data, tars, zips or "
            "Parquet, as each image would be a request: convert it with mvssl-convert and copy the result there.",
            field="data",
        )
    return [name for name in names if not name.lower().endswith(NO_DATA)]


def no_data(url: Url) -> InputError:
    """The error for a URL at which nothing is found."""
    return InputError(
        f"data is {str(url)!r}, which has no manifest.json, but must be data converted with mvssl-convert, or tars, "
        f"zips or Parquet: {_REMEDY}.",
        field="data",
    )


def _folder(text: str) -> str:
    """The folder of a file's URL, in which nothing is a pattern."""
    path = text.partition("?")[0].partition("*")[0]
    return path.rpartition("/")[0]


def _common(folders: list[str]) -> str:
    first, last = min(folders).split("/"), max(folders).split("/")
    same = next((n for n, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return "/".join(first[: min(same, len(last))])
