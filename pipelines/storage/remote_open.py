"""Opens data at a URL: converted data, or tars, zips and Parquet in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipelines.names import Url
from pipelines.storage import direct
from pipelines.storage.forms import Found, Request, open_form
from pipelines.storage.manifest import MANIFEST
from pipelines.storage.remote import RemoteShards
from pipelines.storage.remote_files import Missing, Refused, Remote, RemoteOptions
from pipelines.storage.remote_look import names_files, no_data
from pipelines.storage.source import Source


def open_remote(url: Url, options: RemoteOptions, progress: Callable[[int], None] | None = None) -> Source:
    """Open the data at a URL.

    Raises:
        InputError: there are none, they may not be read, or the server does not answer.
    """
    refused: Missing | None = None
    if not _names_files(url):
        try:
            return RemoteShards(url, options)
        except Missing as error:
            refused = error
    try:
        found = direct.open_url(url, options, progress=progress)
    except Refused as error:
        raise (refused if isinstance(refused, Refused) else error) from None
    if found is not None:
        return found
    if isinstance(refused, Refused):
        raise refused
    raise no_data(url)


def remote_splits(url: Url, options: RemoteOptions) -> tuple[Path, Path | None]:
    """Paths (train, val) of the data at a URL: converted data in its folders train and val, or else as of data on a
    disk; (url, None) if there are no splits."""
    names = converted_splits(url, options)
    if names:
        paths = [url / name for name in names]
        return paths[0], paths[1] if len(paths) > 1 else None
    return direct.split_paths(url, remote=options) or (url, None)


def converted_splits(url: Url, options: RemoteOptions) -> list[str]:
    """Folders at a URL with converted data: [""], ["train/"] or ["train/", "val/"]; [] for data of another kind.

    Raises:
        Refused: it may not be read.
    """
    if _names_files(url):
        return []
    remote = Remote(url, options)
    found: list[str] = []
    refused: list[Refused] = []
    for name in ("", "train/", "val/"):
        if name == "val/" and not found:
            break
        try:
            remote.read(f"{name}{MANIFEST}")
        except Refused as error:  # without a right to list, S3 says so of what does not exist
            refused.append(error)
        except Missing:
            continue
        else:
            found.append(name)
        if found == [""]:
            break
    if not found and refused and not _lists(remote):
        raise refused[0]
    return found


def open_form_at(url: Url, request: Request, options: RemoteOptions) -> Found:
    """The splits of tars, zips, Parquet or another form at a URL, to be converted."""
    asked = direct.look_for_form(url, options)
    if asked is None:
        raise no_data(url)
    asked.check(in_place=False)
    return open_form(asked.form, asked.look, request)


def _lists(remote: Remote) -> bool:
    try:
        return bool(remote.listing())
    except Refused:
        return False


def _names_files(url: Url) -> bool:
    return names_files(url) or direct.base_of(url) != url
