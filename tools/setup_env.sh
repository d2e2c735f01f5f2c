# shellcheck shell=bash
# Sourced by demo.sh and test.sh: creates or reuses the Python environment and installs the project into it.
#
#   . tools/setup_env.sh
#   setup_env test             # extras of pyproject.toml, none by default
#
# Sets ROOT (the repository), ENV_DIR (the environment) and PYTHON (its interpreter), and puts its commands first on PATH.
# Uses the active virtual environment, else .venv in the repository. Needs only bash and Python 3.11 or newer: no git, no
# compiler. A second call installs nothing unless pyproject.toml has changed.

unset CDPATH # with it, cd would print the folder
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

say() { printf '%s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Whether interpreter "$1" starts and is new enough.
python_fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 </dev/null; }

python_version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null </dev/null || echo "that does not start"; }

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }

# Install Debian packages; requires can_apt.
apt_install() {
    say "Installing the system packages $* with apt-get ..."
    {
        DEBIAN_FRONTEND=noninteractive apt-get -q update &&
            DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@"
    } >"$APT_LOG" 2>&1 </dev/null
}

# Print the first interpreter that is new enough.
find_python() {
    local candidate
    for candidate in python3 python3.12 python3.13 python3.11 python3.14 python; do
        if command -v "$candidate" >/dev/null 2>&1 && python_fits "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# Create environment "$2" with interpreter "$1"; a bare Debian or Ubuntu lacks the package for `python3 -m venv`.
make_env() {
    local python="$1" env="$2" package
    package="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 </dev/null && can_apt; then
        apt_install "$package" || tail -n 5 "$APT_LOG" >&2
    fi
    say "Creating the Python environment $env ..."
    if "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 </dev/null; then
        "$python" -m venv --clear "$env" </dev/null
    elif command -v uv >/dev/null 2>&1; then
        rm -rf "$env"
        uv venv --quiet --seed --python "$python" "$env" </dev/null
    elif command -v virtualenv >/dev/null 2>&1; then
        virtualenv --quiet --clear --python "$python" "$env" </dev/null
    else
        fail "$python cannot create virtual environments: install $package (apt-get install $package), or uv, or virtualenv, and start again."
    fi || fail "the Python environment $env could not be created: read the message above."
}

# Set ENV_DIR and PYTHON.
choose_env() {
    local found
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        ENV_DIR="$VIRTUAL_ENV"
        [ -x "$ENV_DIR/bin/python" ] || fail "VIRTUAL_ENV is $ENV_DIR but has no bin/python: activate another environment or unset VIRTUAL_ENV."
    else
        ENV_DIR="$ROOT/.venv"
        if ! "$ENV_DIR/bin/python" -c '' >/dev/null 2>&1 </dev/null; then
            found="$(find_python)" || fail "Python $(python_version python3) is too old: install Python 3.11 or newer so that python3 or python3.11 starts it."
            make_env "$found" "$ENV_DIR"
        fi
    fi
    PYTHON="$ENV_DIR/bin/python"
    python_fits "$PYTHON" || fail "the environment $ENV_DIR has Python $(python_version "$PYTHON") but 3.11 or newer is needed: remove it or activate another one."
}

# Hash of everything an installation depends on: pyproject.toml, the repository's path and the Python version.
setup_key() {
    "$PYTHON" - "$ROOT" <<'PYTHON_CODE'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
print(hashlib.sha256((root / "pyproject.toml").read_bytes() + repr((str(root), sys.version)).encode()).hexdigest())
PYTHON_CODE
}

# Run a command with its output in file "$1", and print the last line of the output every 20 seconds.
run_with_progress() {
    local log="$1" start=$SECONDS next=20 job
    shift
    "$@" >"$log" 2>&1 </dev/null &
    job=$!
    trap 'kill "$job" 2>/dev/null; exit 130' INT TERM
    while kill -0 "$job" 2>/dev/null; do
        sleep 0.5
        if [ $((SECONDS - start)) -ge $next ]; then
            say "  ... $((SECONDS - start)) s: $(tail -n 1 "$log" | cut -c 1-100)"
            next=$((next + 20))
        fi
    done
    trap - INT TERM
    wait "$job"
}

install_project() {
    local extras="$1" installer=("$PYTHON" -m pip install --no-input --disable-pip-version-check --progress-bar off)
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1 </dev/null; then
        if command -v uv >/dev/null 2>&1; then
            installer=(uv pip install --python "$PYTHON")
        else
            "$PYTHON" -m ensurepip >/dev/null 2>&1 </dev/null || fail "the environment $ENV_DIR has no pip: add it (python -m ensurepip) or install uv."
        fi
    fi
    say "Installing mvssl${extras:+ with the extras $extras} into $ENV_DIR (PyTorch with CUDA: about 7 GB, some minutes the first time) ..."
    if ! run_with_progress "$ENV_DIR/setup.log" "${installer[@]}" -e "$ROOT${extras:+[$extras]}"; then
        tail -n 25 "$ENV_DIR/setup.log" >&2
        fail "the installation failed (the end of $ENV_DIR/setup.log is above); it needs the network and about 12 GB of free disk."
    fi
}

setup_env() {
    local extras="${1:-}" start=$SECONDS stamp key
    # Modules of another checkout must not be found.
    unset PYTHONHOME PYTHONPATH
    APT_LOG="$(mktemp "${TMPDIR:-/tmp}/mvssl-apt.XXXXXX")"
    choose_env
    stamp="$ENV_DIR/.mvssl-setup${extras:+-$extras}"
    key="$(setup_key)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
        install_project "$extras"
        printf '%s\n' "$key" >"$stamp"
        say "Installed in $((SECONDS - start)) s."
    fi
    rm -f "$APT_LOG"
    export PATH="$ENV_DIR/bin:$PATH" VIRTUAL_ENV="$ENV_DIR"
}

# torch.compile needs a C++ compiler and Python's headers; without them its tests are skipped with a reason.
ensure_compiler() {
    local version missing=()
    version="$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    command -v g++ >/dev/null 2>&1 || command -v c++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 || missing+=(g++)
    "$PYTHON" -c 'import pathlib, sysconfig, sys
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").is_file())' || missing+=("python$version-dev")
    [ ${#missing[@]} -gt 0 ] || return 0
    APT_LOG="$(mktemp "${TMPDIR:-/tmp}/mvssl-apt.XXXXXX")"
    if ! can_apt || ! apt_install "${missing[@]}"; then
        say "Note: ${missing[*]} (names on Debian) not found: the tests of torch.compile are skipped."
    fi
    rm -f "$APT_LOG"
}
