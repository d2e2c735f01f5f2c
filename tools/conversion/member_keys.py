"""Names for tar members: safe to unpack, unique, and read by WebDataset as one sample each."""

from __future__ import annotations

from collections.abc import Iterable

from pipelines.storage.index import IMAGE_EXTENSIONS


def member_keys(names: Iterable[str]) -> list[str]:
    """Turn source keys (relative paths) into tar stems, in order.

    The image extension goes, dots in the last part become underscores (WebDataset cuts a name at its first dot), a
    leading ``/`` and ``..`` go, and a stem already taken gets ``_1``, ``_2``, ... behind it.
    """
    taken: set[str] = set()
    keys = []
    for name in names:
        stem = _stem(name)
        key, count = stem, 0
        while key in taken:
            count += 1
            key = f"{stem}_{count}"
        taken.add(key)
        keys.append(key)
    return keys


def _stem(name: str) -> str:
    *folders, last = [part for part in name.split("/") if part not in ("", ".", "..")] or ["image"]
    lower = last.lower()
    for extension in IMAGE_EXTENSIONS:
        if lower.endswith(extension):
            last = last[: -len(extension)]
            break
    return "/".join([*folders, last.replace(".", "_") or "image"])
