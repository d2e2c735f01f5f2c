"""Checks the tree of pages of an LMDB file, which LMDB itself believes: a page that lies would end the process."""

from __future__ import annotations

import mmap
import struct

import numpy as np
import numpy.typing as npt

from pipelines.files import open_regular
from pipelines.runtime import InputError
from pipelines.storage.forms.look import File

_PAGE_SIZE_AT, _MAIN_AT, _LAST_PAGE_AT = 40, 88, 136  # of a meta page
_FLAGS_AT, _ROOT_AT = 4, 40  # of the description of a database
_HEADER, _NODE = struct.Struct("<QHHHH"), 8  # of a page: number, pad, flags, ends of the free space; bytes of a node
_BRANCH, _LEAF, _DUPLICATES = 1, 2, 4
_BIG = 1  # flag of a node: its value lies in pages of its own
_NONE = 2**64 - 1
_DEEPEST = 32  # levels, LMDB's own limit

Bytes = npt.NDArray[np.uint8]


def check_pages(file: File) -> None:
    """Check that every key and value of the main database lies in pages that are there, and every page once.

    Raises:
        InputError: the file is truncated or damaged.
        OSError: it cannot be read.
    """
    size = int.from_bytes(file.head[_PAGE_SIZE_AT : _PAGE_SIZE_AT + 4], "little")
    if not 256 <= size <= 1 << 16 or size & (size - 1):
        raise InputError(f"{file.path} is a damaged LMDB database: copy or download it again.")
    with open_regular(file.path) as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        metas = [mapped[at : at + size] for at in (0, size)]
        if any(len(meta) < _LAST_PAGE_AT + 16 for meta in metas):
            raise InputError(f"{file.path} is truncated: it has {file.size:,} bytes; copy or download it again.")
        meta = max(metas, key=lambda one: struct.unpack_from("<Q", one, _LAST_PAGE_AT + 8))  # the last transaction
        (last,) = struct.unpack_from("<Q", meta, _LAST_PAGE_AT)
        if (last + 1) * size > file.size:
            raise InputError(
                f"{file.path} is truncated: it has {file.size:,} bytes of {(last + 1) * size:,}; copy or download it "
                "again."
            )
        (flags,) = struct.unpack_from("<H", meta, _MAIN_AT + _FLAGS_AT)
        (root,) = struct.unpack_from("<Q", meta, _MAIN_AT + _ROOT_AT)
        problem = _problem(mapped, root, size, last)
        if flags & _DUPLICATES:
            problem = "it has several values for a key"
        if problem:
            raise InputError(f"{file.path} is a damaged LMDB database ({problem}): copy or download it again.")


def _problem(mapped: mmap.mmap, root: int, size: int, last: int) -> str:
    """What is wrong in the pages below `root`, of `size` bytes each and numbers up to `last`; "" if nothing is."""
    level = np.array([] if root == _NONE else [root], np.uint64)
    seen = 0
    for _ in range(_DEEPEST):
        below = []
        seen += len(level)
        if seen > last + 1:
            return "a page is used twice"
        for number in level.tolist():
            if not 2 <= number <= last:
                return f"it leads to page {number:,}, which it does not have"
            page = np.frombuffer(mapped[number * size : (number + 1) * size], np.uint8)
            children = _children(page, number, size, last)
            if children is None:
                return f"page {number:,} is damaged"
            below.append(children)
        if not below or not sum(map(len, below)):
            return ""
        level = np.concatenate(below)
    return "its pages are nested too deep"


def _children(page: Bytes, number: int, size: int, last: int) -> npt.NDArray[np.uint64] | None:
    """The pages below a branch, none below a leaf; None if a number on the page lies."""
    own, _, flags, lower, upper = _HEADER.unpack_from(page.data)
    count, rest = divmod(lower - _HEADER.size, 2)
    if own != number or flags & ~0x10 not in (_BRANCH, _LEAF) or rest or not _HEADER.size <= lower <= upper <= size:
        return None
    at = page[_HEADER.size : lower].view("<u2").astype(np.int64)
    if count < (2 if flags & _BRANCH else 1) or np.any((at < upper) | (at + _NODE > size)):
        return None
    low, high, kind, key = page[at[:, None] + np.arange(_NODE)].view("<u2").astype(np.uint64).T  # [nodes] each
    start = at + _NODE + key.astype(np.int64)
    if flags & _BRANCH:
        children: npt.NDArray[np.uint64] = low | high << np.uint64(16) | kind << np.uint64(32)
        return None if np.any(start > size) else children
    value = (low | high << np.uint64(16)).astype(np.int64)
    big = (kind & np.uint64(_BIG)).astype(bool)
    if np.any(start + np.where(big, 8, value) > size):
        return None
    first = page[start[big][:, None] + np.arange(8)].copy().view("<u8").ravel()
    pages = (value[big] + _HEADER.size + size - 1) // size
    if np.any((first < 2) | (first > last) | (first + pages.astype(np.uint64) > last + 1)):
        return None
    return np.zeros(0, np.uint64)
