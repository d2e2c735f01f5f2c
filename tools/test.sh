#!/usr/bin/env bash
# Runs all checks with one command: installation, lint, format, types, tests, and the interpreted Triton kernels.
#
#   tools/test.sh                        # everything except timing tests: 12 to 18 minutes on two cores
#   tools/test.sh -m "not slow"          # the fast lane: some minutes on two cores, without interpreted kernels
#   tools/test.sh -m timing              # tests that measure real time: on an idle machine only
#   tools/test.sh tests/tools -k demo    # arguments go to pytest
#
# Tests marked `timing` are left out unless -m names them; plain `pytest` runs them too.
# Needs only python3 (3.11 or newer); see setup_env.sh. Tests that need CUDA or FFCV skip themselves with a reason; FFCV
# is installed if possible (see install_ffcv.sh).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env test
ensure_compiler
# For the tests that read and write .beton files with FFCV.
timeout 900 "$ROOT/tools/install_ffcv.sh" </dev/null || say "Note: without FFCV its tests are skipped."
cd "$ROOT"

failed=()
section() {
    local name="$1" start=$SECONDS
    shift
    printf '\n=== %s\n' "$name"
    if ! "$@" </dev/null; then
        failed+=("$name")
    fi
    times="${times:+$times, }$name $((SECONDS - start)) s"
}

# One process per core with one thread each: small tensors gain nothing from more threads. All tests of a file run in one
# process, so its module fixtures are created once; files start in the order of tests/conftest.py, the longest first.
run_tests() {
    local markers="not timing" arguments=()
    while [ $# -gt 0 ]; do
        if [ "$1" = -m ] && [ $# -gt 1 ]; then
            case "$2" in
                *timing*) markers="$2" ;;
                *) markers="($2) and not timing" ;;
            esac
            shift 2
        else
            arguments+=("$1")
            shift
        fi
    done
    # For the same reason torch.compile starts no processes of its own.
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCHINDUCTOR_COMPILE_THREADS=1 MPLBACKEND=Agg \
        "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
        -m "$markers" ${arguments[@]+"${arguments[@]}"}
}

section "lint" "$PYTHON" -m ruff check .
section "format" "$PYTHON" -m ruff format --check .
section "types" "$PYTHON" -m mypy
section "tests" run_tests "$@"
if [ $# -eq 0 ]; then # a run of its own: Triton reads TRITON_INTERPRET when it is imported
    section "kernels" env TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
        "$PYTHON" -m pytest -n auto --maxprocesses 4 tests/pipelines/views/test_fused_interpreted.py tests/mvssl/models/test_batchnorm_kernels.py
fi

printf '\n'
if [ ${#failed[@]} -gt 0 ]; then
    joined="$(printf ', %s' "${failed[@]}")"
    say "FAILED: ${joined:2} (total $SECONDS s: $times)"
    exit 1
fi
say "All passed in $SECONDS s ($times)."
