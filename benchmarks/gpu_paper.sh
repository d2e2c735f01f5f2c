#!/usr/bin/env bash
# Cells of the paper's comparison (benchmarks.paper_small) on a machine with one GPU and no network, for one lease of it.
#
#   DATA=tiny-imagenet-50.tar.xz OUT=out benchmarks/gpu_paper.sh      # or DATA=FOLDER with train/ and val/
#   DATA=... benchmarks/gpu_paper.sh --methods mocov3 --seeds 1 2     # other options go to benchmarks.paper_small
#   benchmarks/gpu_paper.sh --rehearse                                # six tiny cells of drawn pictures, on the CPU
#
# The points are those that were tuned on the CPU (benchmarks/results/paper_small_cpu), so that every cell is one of the
# table: BYOL with one predictor for all and with one per view type, three seeds, in the first nine minutes of an H100.
# It goes on from the cells that are committed in benchmarks/results/paper_small_gpu, the most telling first, begins none
# that would not end within SECONDS_IN_ALL (540), and says how many are left. New cells lie in OUT/paper_small_gpu.tar,
# rewritten every five seconds: unpack it in benchmarks/results, commit, and the next lease goes on from there. DALI is
# not needed, since every image is decoded once and then kept in GPU memory. Compiled code is kept in the user's cache.
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
if [ -n "$rehearse" ]; then
    device=${DEVICE:-cpu}
    setting=rehearsal
    more=(--methods byol --optimizers paper --cells 6 ${more[@]+"${more[@]}"})
    for class in a b; do
        "$python" -m benchmarks.measuring.draw_photos "$scratch/drawn/train/$class" --count 21 --height 40 --width 40 &&
            "$python" -m benchmarks.measuring.draw_photos "$scratch/drawn/val/$class" --count 3 --height 40 --width 40 ||
            exit 1
    done
    DATA=$scratch/drawn
fi
data=$(at "$DATA")
name=paper_small_$setting
saver=
finish() {
    [ -n "$saver" ] && kill "$saver" 2>/dev/null
    rm -rf "$scratch"
}
trap finish EXIT

save() { # write the cells that are new into one file, which is whole at any moment
    (cd "$scratch/results" && find "$name" -name '*.json' -newer "$scratch/before" | tar cf "$scratch/part.tar" -T -) &&
        cp "$scratch/part.tar" "$out/.$name.tar" && mv "$out/.$name.tar" "$out/$name.tar"
}

mkdir -p "$out" "$scratch/results/$name" || exit 1
if [ -d "benchmarks/results/$name" ]; then
    cp -p "benchmarks/results/$name"/*.json "$scratch/results/$name/" 2>/dev/null
fi
touch "$scratch/before"
if [ -f "$data" ]; then
    mkdir "$scratch/data"
    if ! tar xf "$data" -C "$scratch/data"; then
        printf 'error: DATA (%s) cannot be unpacked: give a tar file, packed or not, or a folder.\n' "$DATA" >&2
        exit 1
    fi
    train=$(find "$scratch/data" -type d -name train | head -n 1)
    data=${train%/train}
fi
(while sleep 5 && kill -0 $$; do save; done) > /dev/null 2>&1 &
saver=$!
left=$((${SECONDS_IN_ALL:-540} - (SECONDS - start)))
code=0
"$python" -m benchmarks.paper_small "$data" --setting "$setting" --device "$device" --jobs "${JOBS:-2}" \
    --out "$scratch/results/$name" --runs "$scratch/runs" --seconds "$((left > 1 ? left : 1))" \
    ${more[@]+"${more[@]}"} || code=$?
kill "$saver" 2>/dev/null
wait "$saver" 2>/dev/null
saver=
save || code=1
printf 'New cells: %s in %s\n' "$(tar tf "$out/$name.tar" | wc -l)" "${OUT:-.}/$name.tar"
exit "$code"
