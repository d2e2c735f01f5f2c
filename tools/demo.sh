#!/usr/bin/env bash
# The whole way with one command: from a folder of JPEGs to a pre-trained backbone and its kNN accuracy.
#
#   tools/demo.sh                        # everything goes to demo_out/ in the repository
#   tools/demo.sh --seed 1 --out DIR     # other pictures and other initial weights; another folder
#
# Draws a small labelled data set, converts it to shards, pre-trains the multi-task BYOL on it, compares the trained with
# the untrained backbone, and exports it. About 5 minutes on two CPU cores after the installation. Needs python3 (3.11 or
# newer) only; see setup_env.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

SEED=0
OUT="$ROOT/demo_out"
while [ $# -gt 0 ]; do
    case "$1" in
        --seed | --out)
            [ $# -ge 2 ] || fail "$1 needs a value: tools/demo.sh [--seed N] [--out DIR]."
            if [ "$1" = --seed ]; then SEED="$2"; else OUT="$2"; fi
            shift 2
            ;;
        -h | --help)
            sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) fail "unknown argument $1: tools/demo.sh [--seed N] [--out DIR]." ;;
    esac
done
[[ "$SEED" =~ ^[0-9]{1,9}$ ]] || fail "--seed is $SEED but must be a whole number from 0 to 999999999: give another one."

mkdir -p "$OUT" || fail "the folder $OUT cannot be made: choose another one with --out."
OUT="$(cd "$OUT" && pwd -P)"
# What an earlier demo left may go; a folder of somebody else's may not.
if [ ! -e "$OUT/.mvssl-demo" ] && [ -n "$(ls -A "$OUT")" ]; then
    fail "--out is $OUT, which holds files that are not the demo's: choose a new or empty folder."
fi
touch "$OUT/.mvssl-demo" || fail "the folder $OUT cannot be written: choose another one with --out."

setup_env
rm -rf "$OUT/images" "$OUT/shards" "$OUT/run" "$OUT/backbone.safetensors"
cd "$ROOT"

begun=$SECONDS
step() {
    local title="$1" start=$SECONDS
    shift
    printf '\n--- %s\n' "$title"
    "$@" </dev/null || fail "the demo stopped at \"$title\": read the message above."
    printf '    (%s s)\n' $((SECONDS - start))
}

step "1/6 Draw a labelled data set" "$PYTHON" -m tools.make_demo_dataset "$OUT/images" --seed "$SEED"
step "2/6 Convert it to shards" mvssl-convert "$OUT/images" "$OUT/shards" --format shards
step "3/6 Pre-train multi-task BYOL" mvssl-train demo --data "$OUT/shards" --out "$OUT/run" --seed "$SEED" --device cpu
step "4/6 kNN of the untrained backbone" mvssl-eval knn --run "$OUT/run" --untrained --device cpu
step "5/6 kNN of the trained backbone" mvssl-eval knn --run "$OUT/run" --device cpu
step "6/6 Export the backbone" mvssl-export --run "$OUT/run" --out "$OUT/backbone.safetensors"

printf '\n--- Done in %s s (the installation not counted)\n\n' $((SECONDS - begun))
"$PYTHON" -m tools.demo_summary "$OUT"
