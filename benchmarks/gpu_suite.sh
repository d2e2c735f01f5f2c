#!/usr/bin/env bash
# Every benchmark that needs a GPU, on one machine with one GPU and no network, in under ten minutes.
#
#   benchmarks/gpu_suite.sh                                  # 512 drawn pictures of 500 x 375 pixels
#   DATA=photos OUT=results benchmarks/gpu_suite.sh          # a folder of images or a converted data set
#
# It runs, the most important first, and leaves in ${OUT:-benchmarks/results} as it comes:
#   gpu_tests.txt              the tests marked gpu, five at a time, while the step compiles, if pytest-xdist is there
#   step_cuda.json             the step alone, ResNet-50, ViT-S and ViT-B, with batch 128 and then 256: captured,
#                              compiled, grouped and view by view against a plain step; also while the loader works
#   loader_cuda.json           source images/s of our loader against a DataLoader with WORKERS processes
#   train_cuda.json            the same end to end with ResNet-50, batch 128, and against our step on noise
#   views_cuda_bfloat16.json   images/s of the view engine's backends fused and reference, of compiled plain torch, of
#   views_cuda_float32.json    torchvision on GPU tensors, of DALI and of kornia; those that are not installed are left
#                              out with a line. 256 images a batch, two batches a turn, median of 5 turns
#   tune_fused.json            time of each kernel of the fused engine, with the block sizes it has and with others
#   start_cuda.json            seconds to the first steps, compiled with empty and with filled caches, and not compiled
#   view_bytes.md              bytes each kernel of the fused engine must move; to be filled in from a profiler
# `python -m benchmarks.tables` then writes them into the tables of the READMEs.
# benchmarks.paper_small is not part of it: it trains, and takes longer.
#
# Nothing is run where there is no CUDA device or a package is missing (tyro is, on some GPU machines): it says so and
# ends with 1. After that the suite goes on after a command that fails, and ends with 1 then. All commands together may
# take SECONDS_IN_ALL (540 s): the step half of it, each other one a third at most; one for which no time is left counts
# as failed. What a command had measured until then is kept.
# Environment: PYTHON (python3), DATA, OUT, SECONDS_IN_ALL, DEVICE (cuda; cpu is for trying the script),
# NUM_IMAGES (256), REPEATS (5), THREADS (8, of DALI and of torch on the CPU), WORKERS (one a core, at most 16),
# CONTENDERS (of the views; all; a list of names with spaces between).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
out=${OUT:-benchmarks/results}
num_images=${NUM_IMAGES:-256}
workers=${WORKERS:-$(($(nproc) < 16 ? $(nproc) : 16))}
failed=0

"$python" -c '
import importlib, sys
missing = []
for name in sys.argv[3:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing.append(error.name or name)
if missing:
    lacks = ", ".join(dict.fromkeys(missing))
    sys.exit(f"error: {sys.argv[1]} lacks {lacks}: install what is missing, or set PYTHON to a Python that has it.")
import torch
if sys.argv[2] == "cuda" and not torch.cuda.is_available():
    sys.exit("error: torch finds no CUDA device here, so nothing was measured: run this on a machine with a GPU.")
' "$python" "$device" torch numpy PIL rich safetensors timm matplotlib tyro || exit 1

in_all=${SECONDS_IN_ALL:-540}

run() { # run NAME SECONDS COMMAND...: says what is run, for so long at most, and notes it if it fails
    local name=$1 most=$2 code=0 left=$((in_all - SECONDS))
    shift 2
    printf -- '--- %s\n' "$name"
    if [ "$left" -le 0 ]; then
        code=124
    else
        timeout --kill-after=10 "$((left < most ? left : most))" "$@" || code=$?
    fi
    if [ "$code" -ne 0 ]; then
        printf 'FAILED: %s (exit code %s)\n' "$name" "$code" >&2
        failed=1
    fi
}

mkdir -p "$out" || exit 1
data=${DATA:-}
if [ -z "$data" ]; then
    scratch=$(mktemp -d) || exit 1
    trap 'rm -rf "$scratch"' EXIT
    data=$scratch/drawn_500x375
    run "draw pictures" 60 "$python" -m benchmarks.measuring.draw_photos "$data" --count $((2 * num_images))
fi
read -r -a contenders <<< "${CONTENDERS:-}"
third=$((in_all / 3))

tests=
if [ "$device" = cuda ]; then
    if "$python" -c 'import pytest, xdist' 2>/dev/null; then
        OMP_NUM_THREADS=2 timeout --kill-after=10 "$((in_all / 2))" \
            "$python" -m pytest -m gpu -n 5 -q -p no:cacheprovider > "$out/gpu_tests.txt" 2>&1 &
        tests=$!
    else
        printf 'The GPU tests are left out: pytest or pytest-xdist is missing.\n'
    fi
fi
run "step" $((in_all / 2)) "$python" -m benchmarks.bench_step --device "$device" --data "$data" --batch-sizes 128 256 \
    --steps 10 --repeats 2 --seconds $((in_all / 2 - 40)) --out "$out/step_$device.json"
if [ -n "$tests" ]; then
    wait "$tests" || { printf 'FAILED: GPU tests, see %s\n' "$out/gpu_tests.txt" >&2; failed=1; }
    tail -n 1 "$out/gpu_tests.txt"
fi
run "loader" "$third" "$python" -m benchmarks.bench_loader "$data" --device "$device" --decoders auto \
    --workers "$workers" --batch-size 128 --num-batches 4 --repeats 2 --seconds 60 --out "$out/loader_$device.json"
run "training" "$third" "$python" -m benchmarks.bench_train "$data" --device "$device" --workers "$workers" \
    --batch-size 128 --steps 10 --repeats 1 --seconds 90 --out "$out/train_$device.json"
for dtype in bfloat16 float32; do
    run "views in $dtype" "$third" "$python" -m benchmarks.bench_views "$data" --device "$device" --dtype "$dtype" \
        --num-images "$num_images" --repeats "${REPEATS:-5}" --threads "${THREADS:-8}" \
        --out "$out/views_${device}_$dtype.json" ${contenders[@]+--contenders "${contenders[@]}"}
done
if [ "$device" = cuda ]; then
    run "block sizes of the kernels" "$third" "$python" -m benchmarks.tune_fused --num-images "$num_images" \
        --out "$out/tune_fused.json"
fi
run "start" "$third" "$python" -m benchmarks.bench_start --device "$device" --batch-size 128 \
    --out "$out/start_$device.json"
run "bytes of the kernels" 60 bash -c '"$1" -m benchmarks.measuring.view_bytes > "$2"' - "$python" "$out/view_bytes.md"

[ "$failed" -eq 0 ] && printf 'Done: %s\n' "$out"
exit "$failed"
