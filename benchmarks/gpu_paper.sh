#!/usr/bin/env bash
# Cells of the paper's comparison (benchmarks.paper_small) on a machine with one GPU and no network, within nine minutes.
#
#   DATA=tiny-imagenet-50.tar.xz OUT=out benchmarks/gpu_paper.sh      # or DATA=FOLDER with train/ and val/
#   DATA=... benchmarks/gpu_paper.sh --methods mocov3 --seeds 1 2     # other options go to benchmarks.paper_small
#   benchmarks/gpu_paper.sh --rehearse                                # six tiny cells of synthetic images, on the CPU
#
# The points are those that were tuned on the CPU (benchmarks/results/paper_small_cpu.jsonl), so every cell is one of the
# table: BYOL with a shared predictor and with one per view type, three seeds, in the first nine minutes of an H100.
# It continues after the cells in OUT/paper_small_gpu.jsonl, else after those that are committed, the most informative
# first, begins none that would not end within SECONDS_IN_ALL (540), and says how many are left. Every finished cell is
# added to OUT/paper_small_gpu.jsonl, which is whole at any moment: copy it to benchmarks/results and commit it, and the
# next call continues there. DALI is not needed, since every image is decoded once and then cached in GPU memory.
# Compiled code is kept in the user's cache.
#
# Environment: PYTHON (python3), DATA, OUT (.), SECONDS_IN_ALL (540), JOBS (2, runs at a time), SETTING (gpu; cpu is for
# trying the script), DEVICE (cuda; cpu with --rehearse).
set -uo pipefail
start=$SECONDS
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

at() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$called_from" "$1" ;; esac; }
rehearse= more=()
for word in "$@"; do
    if [ "$word" = --rehearse ]; then rehearse=1; else more+=("$word"); fi
done
if [ -z "${DATA:-}" ] && [ -z "$rehearse" ]; then
    printf 'error: DATA is missing: give tiny-imagenet-50 as a .tar.xz file or as a folder with train/ and val/.\n' >&2
    exit 1
fi
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
setting=${SETTING:-gpu}
out=$(at "${OUT:-.}")
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
if [ -n "$rehearse" ]; then
    device=${DEVICE:-cpu}
    setting=rehearsal
    more=(--methods byol --optimizers paper --cells 6 ${more[@]+"${more[@]}"})
    photos() { "$python" -m benchmarks.harness.synthetic_photos "$scratch/synthetic/$1" --count "$2" --height 40 --width 40; }
    for class in a b; do
        photos "train/$class" 21 && photos "val/$class" 3 || exit 1
    done
    DATA=$scratch/synthetic
fi
data=$(at "$DATA")
if [ -f "$data" ]; then
    mkdir "$scratch/data"
    if ! tar xf "$data" -C "$scratch/data"; then
        printf 'error: DATA (%s) cannot be unpacked: give a tar file, packed or not, or a folder.\n' "$DATA" >&2
        exit 1
    fi
    train=$(find "$scratch/data" -type d -name train | head -n 1)
    data=${train%/train}
fi
mkdir -p "$out" || exit 1
results=$out/paper_small_$setting.jsonl
if [ ! -e "$results" ] && [ -e "benchmarks/results/paper_small_$setting.jsonl" ]; then
    cp "benchmarks/results/paper_small_$setting.jsonl" "$results" || exit 1
fi
cells() { [ -e "$results" ] && wc -l < "$results" || printf 0; }
before=$(cells)
left=$((${SECONDS_IN_ALL:-540} - (SECONDS - start)))
code=0
"$python" -m benchmarks.paper_small "$data" --setting "$setting" --device "$device" --jobs "${JOBS:-2}" \
    --out "$results" --runs "$scratch/runs" --seconds "$((left > 1 ? left : 1))" \
    ${more[@]+"${more[@]}"} || code=$?
printf 'New cells: %s in %s\n' "$(($(cells) - before))" "${OUT:-.}/paper_small_$setting.jsonl"
exit "$code"
