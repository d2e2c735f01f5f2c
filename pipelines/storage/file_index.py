"""Index of the image files in a folder."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.runtime import InputError
from pipelines.storage.source import KeyTable

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp")
_NETPBM = (".ppm", ".pgm", ".pbm", ".pnm")
_BUILT_IN = (*_JPEG, ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", *_NETPBM, ".gif", ".jp2", ".j2k", ".avif")
_WITH_PLUGIN = (".heic", ".heif", ".hif")
IMAGE_EXTENSIONS = _BUILT_IN + (_WITH_PLUGIN if importlib.util.find_spec("pillow_heif") else ())
"""Extensions of image files, in any case. HEIC needs the package pillow_heif."""
_OTHERS = {  # what to do with files of other endings
    "heic heif hif": "pip install pillow-heif, or convert them to JPEG",
    "jxl exr hdr psd xcf ai eps pdf svg tga ico": "export them as PNG or JPEG",
    "cr2 cr3 nef arw dng raf orf rw2 pef srw raw": "develop them to JPEG or TIFF",
    "dcm nii mha nrrd svs ndpi czi": "export them as PNG (8 or 16 bits)",
    "mp4 mov avi mkv webm mpg mpeg m4v wmv": "extract their frames, as ffmpeg -i VIDEO FOLDER/%06d.jpg does",
    "tar zip": "give them with a pattern, such as 'FOLDER/*.tar'",
    "tgz gz bz2 xz": "unpack them, or convert them as they are with mvssl-convert",
    "7z rar zst": "unpack them",
    "parquet arrow tfrecord mdb lmdb h5 hdf5": (
        "write their images to files, or convert them as they are with mvssl-convert"
    ),
    "npy npz mat pkl pickle bin pt rec": "write their images to files",
}
_REMEDIES = {f".{ending}": remedy for endings, remedy in _OTHERS.items() for ending in endings.split()}
_HEIC_MAGIC = rb"|\0\0\0.ftyp(hei[cx]|mif1)" if ".heic" in IMAGE_EXTENSIONS else b""
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|P[1-6]\s\d|"
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51|\0\0\0.ftypavi[fs]" + _HEIC_MAGIC,
    re.DOTALL,
)
_ENDING = re.compile(r"\.(?!\d+$)\w{1,12}")  # what is another one, such as .1 or .jpg?size=large, is none
_HIDDEN, _SPECIAL, _BROKEN = "hidden", "special", "broken link"
_SYSTEM_FOLDERS = (  # unreadable for users; thumbnails made by NAS devices; macOS's and Windows' own
    *("lost+found", "@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"),
)
RUN_FILES = frozenset(("config.json", "metrics.jsonl"))
"""Files of the folder of a run, whose pictures are no data."""
FORM_WORDS = re.compile(
    "sets?|splits?|subset|images?|imgs?|jpe?gs?|pngs?|data|dataset|photos?|pictures?|pics?|files?|folder|dir|raw|full|"
    "all|final|clean|new|old|small|large|resized|cropped"
)
"""Words in the name of a folder that say only that there are images, in lower case."""
_THREADS = 8  # concurrent stat or scandir calls: hides the latency of network file systems


@dataclass(frozen=True, kw_only=True, eq=False)
class FileIndex:
    """Every image of a folder or list.

    Attributes:
        root: the folder that relative keys start from.
        keys: path of each image, relative to `root` (absolute if a list says so); sorted, or in the list's order.
        nbytes: int64 [len], file sizes; 0 if stat failed (reading the file then names the error).
        labels: int64 [len], -1 for none.
        classes: class names by label, () if unlabelled.
        watched: absolute paths whose change makes this index stale: every folder scanned, and the list.
        watched_mtime: int64 [len(watched)], their modification times in nanoseconds, taken before they were read.
        ignored: number of other files by extension; also of hidden images, and of folders of the system by name.
        examples: one of the other files for each extension; {} for a cached index.
    """

    root: Path
    keys: KeyTable
    nbytes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    watched: KeyTable
    watched_mtime: npt.NDArray[np.int64]
    ignored: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image: a known extension in any case, and not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def is_system_folder(name: str) -> bool:
    """Whether a folder of this name belongs to the system, and what is in it to nobody."""
    return name in _SYSTEM_FOLDERS


def is_image_file(entry: os.DirEntry[str]) -> bool:
    """Whether a file counts as an image: by its name, or by its first bytes if its name has no ending."""
    if is_image_name(entry.name):
        return True
    ending = os.path.splitext(entry.name)[1]
    return not (_ENDING.fullmatch(ending) or entry.name.startswith(".")) and holds_image(entry.path)


def holds_image(path: str) -> bool:
    """Whether a file begins as images do; False if it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait
            return False
        with open(path, "rb", buffering=0) as file:
            return _MAGIC.match(file.read(16)) is not None
    except OSError:
        return False


def begins_as_image(head: bytes) -> bool:
    """Whether the first 16 bytes or more of a file are those of an image."""
    return _MAGIC.match(head) is not None


def remedy_for(ending: str) -> str:
    """What to do with files of this ending, which are no images; "" if that is not known."""
    return _REMEDIES.get(ending, "")


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """The numbers of files that were ignored, in words."""
    words = {
        _HIDDEN: "hidden",
        _SPECIAL: "that are pipes, sockets or devices",
        _BROKEN: "links to nothing",
        "": "without extension",
    }
    return ", ".join(f"{count:,} {words.get(ending, ending)}" for ending, count in ignored.items())


def no_images(index: FileIndex, path: Path) -> InputError:
    """The error for a folder or list without images: what is there instead, and what to do with it."""
    known = {ending: remedy_for(ending) for ending in index.ignored}
    for ending, example in index.examples.items():
        if not known[ending] and holds_image(example):
            known[ending] = (
                f"rename them to .jpg, .png or what they are ({os.path.basename(example)} begins as an image)"
            )
    there = f"; there are {describe_ignored(index.ignored)}" if index.ignored else ""
    endings: dict[str, list[str]] = {}
    for ending, remedy in known.items():
        endings.setdefault(remedy, []).append(ending or "no extension")
    remedies = [f"{remedy} ({', '.join(of)})" for remedy, of in endings.items() if remedy]
    give = (
        f"give a folder with files ending in {', '.join(IMAGE_EXTENSIONS)} (at any depth), a text list of such files, "
        "or data converted with mvssl-convert"
    )
    return InputError(f"{path} holds no images{there}: {'; '.join([*remedies, give])}.")


def is_data_folder(entry: os.DirEntry[str]) -> bool:
    """Whether `entry` is a folder (or a link to one) that may hold images: neither hidden nor ``lost+found``."""
    if entry.name.startswith(".") or entry.name in _SYSTEM_FOLDERS:
        return False
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def scan_folder(root: Path, *, progress: Callable[[int], None] | None = None) -> FileIndex:
    """Index every image below `root`, sorted by relative path.

    Links are followed; hidden names, folders of the file system and of runs are ignored. Labels are the first folder
    level: the sorted names of the folders that hold images. Images directly in `root` have no label (-1).
    One folder around all is no class if its name says only that there are images, as in Food-101 (``images/``).

    Args:
        root: the folder.
        progress: called with the number of images found so far.
    """
    found: list[tuple[str, int]] = []
    watched: list[tuple[str, int]] = []
    ignored: Counter[str] = Counter()
    examples: dict[str, str] = {}
    level = [_Folder(os.path.abspath(root), "", frozenset())]
    with ThreadPoolExecutor(_THREADS) as pool:
        while level:
            below: list[_Folder] = []
            for listing in pool.map(_list_folder, level):
                watched.append((listing.folder.path, listing.mtime))
                found.extend(listing.images)
                for ending, example in listing.ignored:
                    ignored[ending] += 1
                    if example:
                        examples.setdefault(ending, example)
                below.extend(listing.folders)
                if progress is not None and listing.images:
                    progress(len(found))
            level = below
    found.sort()
    firsts = _class_names(root, [key for key, _ in found], watched)
    classes = tuple(sorted({first for first in firsts if first is not None}))
    label_of: dict[str | None, int] = {None: -1, **{name: label for label, name in enumerate(classes)}}
    return FileIndex(
        root=Path(os.path.abspath(root)),
        keys=KeyTable.of(key for key, _ in found),
        nbytes=np.array([size for _, size in found], dtype=np.int64),
        labels=np.array([label_of[first] for first in firsts], dtype=np.int64),
        classes=classes,
        watched=KeyTable.of(path for path, _ in watched),
        watched_mtime=np.array([mtime for _, mtime in watched], dtype=np.int64),
        ignored=dict(sorted(ignored.items(), key=lambda item: (item[0] not in examples, -item[1], item[0]))),
        examples=examples,
    )


def _class_names(root: Path, keys: list[str], watched: list[tuple[str, int]]) -> list[str | None]:
    """The class of each image; see `scan_folder`. Of Tiny ImageNet's val it is that in its list of annotations."""
    around = keys[0].partition("/")[0] + "/" if keys else ""
    if not FORM_WORDS.fullmatch(around[:-1].lower()) or not keys[-1].startswith(around):  # they are sorted
        around = ""
    table = Path(os.path.abspath(root)) / f"{root.name}_annotations.txt"
    if around and table.is_file():
        watched.append((str(table), table.stat().st_mtime_ns))
        rows = [line.split() for line in table.read_text(encoding="utf-8", errors="replace").split("\n")]
        class_of = {row[0]: row[1] for row in rows if len(row) > 1}
        return [class_of.get(key.rpartition("/")[2]) for key in keys]
    below = (key[len(around) :] for key in keys)
    return [key.partition("/")[0] if "/" in key else None for key in below]


@dataclass(frozen=True)
class _Folder:
    path: str  # absolute
    prefix: str  # relative to the root, "" or ending in "/"
    ancestors: frozenset[tuple[int, int]]  # (device, inode) of the folders above, to detect links in a cycle


@dataclass
class _Listing:
    folder: _Folder
    mtime: int = 0
    images: list[tuple[str, int]] = field(default_factory=list)
    folders: list[_Folder] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)  # extension and path


def _list_folder(folder: _Folder) -> _Listing:
    status = os.stat(folder.path)  # before scandir: a change while we read makes the index stale
    identity = (status.st_dev, status.st_ino)
    listing = _Listing(folder, status.st_mtime_ns)
    if identity in folder.ancestors:
        return listing
    ancestors, of_run = folder.ancestors | {identity}, 0
    with os.scandir(folder.path) as entries:
        for entry in entries:
            of_run += entry.name in RUN_FILES
            if entry.name in _SYSTEM_FOLDERS:
                listing.ignored.append((f"folder {entry.name}", ""))
            elif entry.name.startswith("."):
                if is_image_name(entry.name.lstrip(".")):
                    listing.ignored.append((_HIDDEN, ""))
            elif is_data_folder(entry):
                listing.folders.append(_Folder(entry.path, f"{folder.prefix}{entry.name}/", ancestors))
            elif is_image_file(entry):
                size = _entry_size(entry)
                if size is None:
                    listing.ignored.append((_SPECIAL, ""))
                else:
                    listing.images.append((folder.prefix + entry.name, size))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                listing.ignored.append((_BROKEN, ""))
            else:
                listing.ignored.append((os.path.splitext(entry.name)[1].lower(), entry.path))
    if of_run == len(RUN_FILES) and folder.prefix:
        return _Listing(folder, listing.mtime, ignored=[("folder of a run", "")])
    return listing


def _entry_size(entry: os.DirEntry[str]) -> int | None:
    """Size of a file; None of a pipe, socket or device, whose data may never come."""
    try:
        status = entry.stat()
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    except OSError:  # a broken link stays in the index, so that reading it names it
        return 0
