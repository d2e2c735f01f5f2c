"""Compiles C files with the machine's compiler into the user's cache, once per source, compiler and processor."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from pipelines.files import cache_folder, cache_folders, publish, writable_cache

# No contraction: a fused multiply-add would round differently from the reference. No traps or errno: lets it vectorise.
_OPTIONS = ("-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TIMEOUT = 120  # seconds
_ERROR = re.compile(
    r"\b(error|fatal)\s*:|undefined (reference|symbol)|cannot (find|open)|^\w*(Error|Exception)\b", re.IGNORECASE
)
_WARNING = re.compile(r":\d+: (warning|note): ")
COLOUR = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
_CONSEQUENCE = re.compile(r"ld returned|linker command failed|compilation terminated|exit (code|status)", re.IGNORECASE)


@functools.cache
def load_library(source: Path) -> ctypes.CDLL | str:
    """The library compiled from a C file, or why there is none; compiling takes seconds, once per machine."""
    compiler = _compiler()
    if compiler is None:
        return "no C compiler was found (install gcc, or name one in CC)"
    try:
        return _loaded(source, compiler)
    except subprocess.SubprocessError as error:
        return f"{shlex.join(compiler)} could not build it ({error_line(getattr(error, 'stderr', None) or str(error))})"
    except OSError as error:
        return f"it could not be built ({error_line(str(error))})"


def error_line(output: str) -> str:
    """The line of a compiler's output that names its error, else the last one."""
    lines = [line.strip() for line in COLOUR.sub("", output).splitlines() if line.strip()] or [""]
    errors = [line for line in lines if _ERROR.search(line) and not _WARNING.search(line)]
    causes = [line for line in errors if not _CONSEQUENCE.search(line)]
    return (causes or errors or lines[-1:])[0]


def _compiler() -> list[str] | None:
    """The C compiler's command: CC, or the first of the usual names."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def _loaded(source: Path, compiler: list[str]) -> ctypes.CDLL:
    """The cached library, or a new one if none is whole and loads.

    A damaged file must not be tried: loading one that is cut short kills the process.
    """
    home, name = cache_folder(), f"{source.stem}-{_key(source, compiler)}"
    if home in cache_folders(home) and (library := _cached(home, name)) is not None:  # it may be read-only
        return library
    folder = writable_cache(home, execute=True)
    return _cached(folder, name) or ctypes.CDLL(str(_built(source, compiler, folder, name)))


def _cached(folder: Path, name: str) -> ctypes.CDLL | None:
    """The library in a folder, if it is whole and loads."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        if _is_whole(path):
            with contextlib.suppress(OSError):  # made for another C library, or in a place mounted noexec
                return ctypes.CDLL(str(path))
    return None


def _key(source: Path, compiler: list[str]) -> str:
    """Digest of everything that decides how a library is compiled and where it runs."""
    version = _run([*compiler, "--version"])
    parts = (_text(source), _OPTIONS, compiler, version, _processor(), platform.machine(), platform.libc_ver())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _is_whole(library: Path) -> bool:
    """Whether a file has the content that its name was given for."""
    try:
        return library.stem.endswith(f"-{_digest(library)}")
    except OSError:
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _built(source: Path, compiler: list[str], folder: Path, name: str) -> Path:
    """Compile the library into a folder, as NAME-DIGEST.so."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        aside = Path(temporary) / "library.so"
        build = [*compiler, *_OPTIONS, str(source), "-o", str(aside), "-lm"]
        try:
            _run([*build, "-march=native"], temporary=temporary)
        except subprocess.CalledProcessError:  # the compiler may not know this processor
            _run(build, temporary=temporary)
        library = folder / f"{name}-{_digest(aside)}.so"
        if library.is_dir():  # a file replaces any other file, but no folder
            shutil.rmtree(library, ignore_errors=True)
        publish(aside, library)
    return library


def _text(source: Path) -> list[bytes]:
    """A C file and the files it includes by relative names."""
    text = source.read_bytes()
    included = re.findall(rb'^#include "(.+)"$', text, re.MULTILINE)
    return [text, *(part for name in included for part in _text(source.parent / name.decode()))]


def _run(command: list[str], *, temporary: str | None = None) -> str:
    """Standard output of a compiler, whose messages are English and whose temporary files go to a folder of ours."""
    environment = os.environ | {"LC_ALL": "C"} | ({} if temporary is None else {"TMPDIR": temporary})
    return subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, env=environment
    ).stdout


def _processor() -> str:
    """The processor, on which -march=native depends; machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
