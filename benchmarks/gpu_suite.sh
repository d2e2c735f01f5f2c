#!/usr/bin/env bash
# Every benchmark that needs a GPU, on one machine with one GPU and no network, in under ten minutes.
#
#   benchmarks/gpu_suite.sh                                  # 512 drawn pictures of 500 x 375 pixels
#   DATA=photos OUT=results benchmarks/gpu_suite.sh          # a folder of images or a converted data set
#
# It runs, and leaves in ${OUT:-benchmarks/results}:
#   views_cuda_bfloat16.json   images/s of the view engine's backends fused and reference, of compiled plain torch, of
#   views_cuda_float32.json    torchvision on GPU tensors, of DALI and of kornia; those that are not installed are left
#                              out with a line. 256 images a batch, two batches a turn, median of 5 turns
#   loader_cuda.json           source images/s of our loader against a DataLoader with WORKERS processes
#   train_cuda.json            the same end to end with ResNet-50, batch 128, and against our step on noise
#   tune_fused.json            time of each kernel of the fused engine, with the block sizes it has and with others
#   view_bytes.md              bytes each kernel of the fused engine must move; to be filled in from a profiler
# `python -m benchmarks.tables` then writes them into the tables of the READMEs.
# benchmarks.paper_small is not part of it: it trains, and takes longer.
#
# Nothing is run where there is no CUDA device or a package is missing (tyro is, on some GPU machines): it says so and
# ends with 1. After that the suite goes on after a command that fails, and ends with 1 then. A command may take 270 s,
# all of them together 580 s; one for which no time is left counts as failed.
# Environment: PYTHON (python3), DATA, OUT, DEVICE (cuda; cpu is for trying the script), NUM_IMAGES (256), REPEATS (5),
# THREADS (8, of DALI and of torch on the CPU), WORKERS (one a core, at most 16), CONTENDERS (of the views; all; a list
# of names with spaces between).
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

run() { # run NAME COMMAND...: says what is run, and notes it if it fails
    local name=$1 code=0 left=$((580 - SECONDS))
    shift
    printf -- '--- %s\n' "$name"
    if [ "$left" -le 0 ]; then
        code=124
    else
        timeout --kill-after=10 "$((left < 270 ? left : 270))" "$@" || code=$?
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
    run "draw pictures" "$python" -m benchmarks.draw_photos "$data" --count $((2 * num_images))
fi
read -r -a contenders <<< "${CONTENDERS:-}"
for dtype in bfloat16 float32; do
    run "views in $dtype" "$python" -m benchmarks.bench_views "$data" --device "$device" --dtype "$dtype" \
        --num-images "$num_images" --repeats "${REPEATS:-5}" --threads "${THREADS:-8}" \
        --out "$out/views_${device}_$dtype.json" ${contenders[@]+--contenders "${contenders[@]}"}
done
run "loader" "$python" -m benchmarks.bench_loader "$data" --device "$device" --decoders auto --workers "$workers" \
    --batch-size "$num_images" --num-batches 4 --repeats 2 --out "$out/loader_$device.json"
run "training" "$python" -m benchmarks.bench_train "$data" --device "$device" --workers "$workers" \
    --batch-size 128 --steps 8 --repeats 1 --out "$out/train_$device.json"
if [ "$device" = cuda ]; then
    run "block sizes of the kernels" "$python" -m benchmarks.tune_fused --num-images "$num_images" \
        --out "$out/tune_fused.json"
fi
run "bytes of the kernels" bash -c '"$1" -m benchmarks.view_bytes > "$2"' - "$python" "$out/view_bytes.md"

[ "$failed" -eq 0 ] && printf 'Done: %s\n' "$out"
exit "$failed"
