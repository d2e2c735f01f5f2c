#!/usr/bin/env bash
# Installs FFCV 1.0.2 into the project's environment, or prints what is missing and the commands that install it.
#
#   tools/install_ffcv.sh
#
# mvssl reads and writes .beton files without FFCV. FFCV is for your own programs that read these files, and for the
# tests that compare with it. Needs a compiler, OpenCV and libjpeg-turbo with headers; as root on Debian or Ubuntu, they
# are installed. A second call installs nothing. Exit code 0: FFCV can be imported.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

FFCV=ffcv==1.0.2
MODULES=(numba tqdm opencv-python-headless setuptools) # imported by FFCV; its other requirements are not needed

# Whether FFCV, its modules and the libraries it links to are installed; faster than importing it.
has_ffcv() {
    "$PYTHON" - >/dev/null 2>&1 <<'PYTHON_CODE'
import ctypes, importlib.util, pathlib
specs = {name: importlib.util.find_spec(name) for name in ("ffcv", "numba", "tqdm", "cv2", "setuptools")}
assert all(specs.values())
ctypes.CDLL(str(next(pathlib.Path(specs["ffcv"].origin).parent.glob("_libffcv*.so"))))
PYTHON_CODE
}

has_library() { command -v pkg-config >/dev/null 2>&1 && pkg-config --exists "$1"; }

has_headers() {
    "$PYTHON" -c 'import pathlib, sysconfig, sys
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").is_file())' </dev/null
}

# Set MISSING to the Debian packages needed to compile FFCV.
find_missing() {
    MISSING=()
    command -v g++ >/dev/null 2>&1 || MISSING+=(g++)
    command -v pkg-config >/dev/null 2>&1 || MISSING+=(pkg-config)
    has_library opencv4 || MISSING+=(libopencv-dev)
    has_library libturbojpeg || MISSING+=(libturbojpeg0-dev)
    has_headers || MISSING+=("python$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev")
}

pip_install() {
    if "$PYTHON" -m pip --version >/dev/null 2>&1 </dev/null; then
        "$PYTHON" -m pip install --no-input --disable-pip-version-check --progress-bar off "$@"
    else
        uv pip install --python "$PYTHON" "$@"
    fi
}

install_modules() { pip_install "${MODULES[@]}" && pip_install --no-deps "$FFCV"; }

stop_without_ffcv() {
    say "FFCV is not installed: $1"
    say "Install it with:"
    [ ${#MISSING[@]} -eq 0 ] || say "  apt-get update && apt-get install -y --no-install-recommends ${MISSING[*]}"
    say "  $PYTHON -m pip install ${MODULES[*]}"
    say "  $PYTHON -m pip install --no-deps $FFCV"
    exit 1
}

unset PYTHONHOME PYTHONPATH
choose_env
if has_ffcv; then
    say "FFCV is installed in $ENV_DIR."
    exit 0
fi
"$PYTHON" -c 'import torch' >/dev/null 2>&1 </dev/null || setup_env
start=$SECONDS
APT_LOG="$(mktemp "${TMPDIR:-/tmp}/mvssl-ffcv.XXXXXX")"
trap 'rm -f "$APT_LOG"' EXIT
find_missing
if [ ${#MISSING[@]} -gt 0 ]; then
    can_apt || stop_without_ffcv "it needs ${MISSING[*]} (names on Debian), which only root on Debian or Ubuntu can install."
    if ! apt_install "${MISSING[@]}"; then
        tail -n 5 "$APT_LOG"
        stop_without_ffcv "apt-get failed (the end of its output is above)."
    fi
    find_missing
    [ ${#MISSING[@]} -eq 0 ] || stop_without_ffcv "apt-get did not install ${MISSING[*]}."
    say "Installed the system packages in $((SECONDS - start)) s."
fi
say "Compiling FFCV into $ENV_DIR ..."
if ! install_modules >"$APT_LOG" 2>&1 </dev/null; then
    tail -n 15 "$APT_LOG"
    stop_without_ffcv "pip failed (the end of its output is above)."
fi
if ! "$PYTHON" -c 'import ffcv' >"$APT_LOG" 2>&1 </dev/null; then
    stop_without_ffcv "it was compiled but cannot be imported: $(tail -n 1 "$APT_LOG")"
fi
say "Installed FFCV in $((SECONDS - start)) s."
