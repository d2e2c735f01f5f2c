#!/usr/bin/env bash
# Runs everything once on synthetic images: data set, conversion, pre-training, kNN accuracy, export.
#
#   tools/demo.sh                        # writes to demo_out/ in the repository
#   tools/demo.sh --seed 1 --out DIR     # other images and initial weights; another folder
#
# Pre-trains multi-task BYOL and compares the trained with the untrained backbone. Takes about 5 minutes on two CPU cores
# after the installation. Needs only python3 (3.11 or newer); see setup_env.sh.
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
            sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) fail "unknown argument $1: tools/demo.sh [--seed N] [--out DIR]." ;;
    esac
done
[[ "$SEED" =~ ^[0-9]{1,9}$ ]] || fail "--seed is $SEED but must be a whole number from 0 to 999999999: give another seed."

mkdir -p "$OUT" || fail "the folder $OUT cannot be created: choose another one with --out."
OUT="$(cd "$OUT" && pwd -P)"
# Only the files of an earlier demo are removed.
if [ ! -e "$OUT/.mvssl-demo" ] && [ -n "$(ls -A "$OUT")" ]; then
    fail "--out is $OUT, which holds other files: choose a new or empty folder."
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

step "1/6 Create a synthetic data set" "$PYTHON" -m tools.make_demo_dataset "$OUT/images" --seed "$SEED"
step "2/6 Convert it to shards" mvssl-convert "$OUT/images" "$OUT/shards" --format shards
step "3/6 Pre-train multi-task BYOL" mvssl-train demo --data "$OUT/shards" --out "$OUT/run" --seed "$SEED" --device cpu
step "4/6 kNN of the untrained backbone" mvssl-eval knn --run "$OUT/run" --untrained --device cpu
step "5/6 kNN of the trained backbone" mvssl-eval knn --run "$OUT/run" --device cpu
step "6/6 Export the backbone" mvssl-export --run "$OUT/run" --out "$OUT/backbone.safetensors"

printf '\n--- Done in %s s (without the installation)\n\n' $((SECONDS - begun))
"$PYTHON" -m tools.demo_summary "$OUT"
