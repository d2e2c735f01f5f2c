#!/usr/bin/env bash
# Cells of the paper's comparison (benchmarks.paper_small) on a machine with one GPU and no network, for one lease of it.
#
#   DATA=tiny-imagenet-50.tar.xz OUT=out benchmarks/gpu_paper.sh      # or DATA=FOLDER with train/ and val/
#
# It goes on from the cells that are committed in benchmarks/results/paper_small_gpu, the most telling first, begins none
# that would not end within SECONDS_IN_ALL (540), and says how many are left. New cells lie in OUT/paper_small_gpu.tar,
# written anew after each: unpack it in benchmarks/results, commit, and the next lease goes on from there. A cell is about
# two minutes of an H100; DALI is not needed, since every image is decoded once and then kept in GPU memory.
#
# Environment: PYTHON (python3), DATA, OUT (.), SECONDS_IN_ALL (540), JOBS (1, runs at a time), SETTING (gpu; cpu is for
# trying the script), DEVICE (cuda).
set -uo pipefail
start=$SECONDS
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

at() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$called_from" "$1" ;; esac; }
if [ -z "${DATA:-}" ]; then
    printf 'error: DATA is missing: give tiny-imagenet-50 as a .tar.xz file or as a folder with train/ and val/.\n' >&2
    exit 1
fi
data=$(at "$DATA")
out=$(at "${OUT:-.}")
setting=${SETTING:-gpu}
name=paper_small_$setting
scratch=$(mktemp -d) || exit 1
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
(while sleep 5 && kill -0 $$; do save; done) 2>/dev/null &
saver=$!
code=0
"${PYTHON:-python3}" -m benchmarks.paper_small "$data" --setting "$setting" --device "${DEVICE:-cuda}" \
    --jobs "${JOBS:-1}" --out "$scratch/results/$name" --runs "$scratch/runs" \
    --seconds "$((${SECONDS_IN_ALL:-540} - (SECONDS - start)))" || code=$?
kill "$saver" 2>/dev/null
wait "$saver" 2>/dev/null
saver=
save || code=1
printf 'New cells: %s in %s\n' "$(tar tf "$out/$name.tar" | wc -l)" "${OUT:-.}/$name.tar"
exit "$code"
