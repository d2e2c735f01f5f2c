"""Compiles C files with the machine's compiler into the user's cache, once per source, compiler and processor."""

from __future__ import annotations

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

from pipelines.files import cache_folder

# No contraction: a fused multiply-add would round differently from the reference. No traps or errno: lets it vectorise.
_OPTIONS = ("-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TIMEOUT = 120  # seconds


@functools.cache
def load_library(source: Path) -> ctypes.CDLL | str:
    """The library compiled from a C file, or why there is none; compiling takes seconds, once per machine."""
    compiler = _compiler()
    if compiler is None:
        return "no C compiler was found (install gcc, or name one in CC)"
    try:
        return ctypes.CDLL(str(_built(source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return f"{shlex.join(compiler)} could not build it ({output.strip().splitlines()[0]})"


def _compiler() -> list[str] | None:
    """The C compiler's command: CC, or the first of the usual names."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def _built(source: Path, compiler: list[str]) -> Path:
    """Path of the library; compiles it if it is not cached."""
    version = _run([*compiler, "--version"])
    key = hashlib.sha256(repr((_text(source), _OPTIONS, compiler, version, _processor())).encode()).hexdigest()
    library = cache_folder() / f"{source.stem}-{key[:32]}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            aside = Path(folder) / library.name
            build = [*compiler, *_OPTIONS, str(source), "-o", str(aside), "-lm"]
            try:
                _run([*build, "-march=native"])
            except subprocess.CalledProcessError:  # the compiler may not know this processor
                _run(build)
            aside.replace(library)
    return library


def _text(source: Path) -> list[bytes]:
    """A C file and the files it includes by relative names."""
    text = source.read_bytes()
    included = re.findall(rb'^#include "(.+)"$', text, re.MULTILINE)
    return [text, *(part for name in included for part in _text(source.parent / name.decode()))]


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT).stdout


def _processor() -> str:
    """The processor, on which -march=native depends; machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
