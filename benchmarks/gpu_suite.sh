#!/usr/bin/env bash
# Every benchmark that needs a GPU, on one machine with one GPU and no network, in nine minutes.
#
#   benchmarks/gpu_suite.sh                              # 512 synthetic images of 500 x 375 pixels
#   DATA=photos OUT=out benchmarks/gpu_suite.sh          # a folder of images or a converted data set
#   benchmarks/gpu_suite.sh steps start                  # these parts only
#   benchmarks/gpu_suite.sh --device cpu --rehearse      # all commands in miniature: two minutes, no GPU
#
# Parts, the most important first, and their results:
#   step      step_cuda.json            ResNet-50, batch 128: our compiled and captured step against a plain step
#   loader    loader_cuda.json          our loader from shards, also with cached images, against a DataLoader
#   training  train_cuda.json           both end to end, and on noise
#   views     views_cuda_bfloat16.json  the view engine against torchvision, DALI, kornia and compiled torch
#   tests     gpu_tests.txt             the tests marked gpu; nothing is timed meanwhile
#   steps     steps_cuda.json           ResNet-50, ViT-S and ViT-B, batch 128 and 256, every mode of a step, also while
#                                       the loader works
#   tiny      loader_tiny_cuda.json     the loader with images of 64 pixels
#   kernels   tune_fused.json           each kernel of the fused engine, with its block sizes and with others
#             view_bytes.md             bytes that each of them must move
#   views32   views_cuda_float32.json
#   start     start_cuda.json           seconds to the first steps, compiled with an empty cache, with a filled one, not compiled
#
# OUT/gpu_suite.tgz (OUT: .) holds all results and suite.log. It is rewritten as results come and is whole at any
# moment, so that a kill loses no more than five seconds; parts that it holds from an earlier call stay. Then:
#   tar xzf gpu_suite.tgz -C benchmarks/results && python -m benchmarks.tables
#
# All parts together take SECONDS_IN_ALL (540) at most. A part for which too little time is left is skipped, and named at
# the end. A part that fails costs the others nothing; then the exit code is 1. The first part that compiles a recipe
# leaves its code in the user's cache folder, where the later ones find it; so do later calls on the same machine.
# tyro, DALI, webdataset, pytest-xdist and kornia need not be installed: a folder on PYTHONPATH is enough. Without DALI,
# Pillow decodes; without kornia or torchvision those implementations are left out; without pytest the tests are.
#
# Environment: PYTHON (python3), DATA, OUT, SECONDS_IN_ALL, NUM_IMAGES (256, of a batch of views), REPEATS (5, of views),
# THREADS (8, of DALI and of torch on the CPU), WORKERS (one a core, at most 16), CONTENDERS (of the views; all; names
# separated by spaces), CLOCK (a file with the seconds since the start, to test what happens when they run out).
set -uo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

all_parts="step loader training views tests steps tiny kernels views32 start"
device=cuda
rehearse=
parts=
while [ $# -gt 0 ]; do
    case $1 in
        --device)
            device=${2:-}
            case $device in
                cuda | cpu) shift ;;
                *) printf -- '--device is %s but must be cuda or cpu: give one of them.\n' "${device:-empty}" >&2; exit 2 ;;
            esac
            ;;
        --rehearse) rehearse=1 ;;
        *)
            case " $all_parts " in
                *" $1 "*) parts="$parts $1" ;;
                *) printf 'part is %s but must be one of %s: correct the name.\n' "$1" "$all_parts" >&2; exit 2 ;;
            esac
            ;;
    esac
    shift
done
parts=${parts:-$all_parts}

at() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$called_from" "$1" ;; esac; }
python=${PYTHON:-python3}
out=$(at "${OUT:-.}")
in_all=${SECONDS_IN_ALL:-540}
cores=$(nproc)
workers=${WORKERS:-$((cores < 16 ? cores : 16))}
num_images=${NUM_IMAGES:-256}
repeats=${REPEATS:-5}
threads=${THREADS:-8}
packed=gpu_suite
recipe=byol_resnet50_200ep
tiny=byol_resnet18_tiny_imagenet
more_recipes=($recipe byol_vits16_200ep byol_vitb16_200ep)
read -r -a contenders <<< "${CONTENDERS:-}"
batch=128 batches=24 steps=20 photos=$((2 * num_images)) tiny_photos=4096 tiny_batch=256
batch_sizes=(128 256)
photo_size=() sizes=() ways=() start=()

found=$("$python" -c '
import importlib, importlib.util, sys
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
from pipelines.decode import missing_dali
print("decoder:pillow" if missing_dali() else "decoder:dali")
print("tests:" + ("yes" if all(importlib.util.find_spec(name) for name in ("pytest", "hypothesis")) else "no"))
print("xdist:" + ("yes" if importlib.util.find_spec("xdist") else "no"))
' "$python" "$device" torch numpy PIL rich safetensors timm tyro) || exit 1
case $found in *decoder:dali*) decoder=dali ;; *) decoder=pillow ;; esac

scratch=$(mktemp -d) || exit 1
results=$scratch/results
mkdir -p "$out" "$results" || exit 1
if [ -n "$rehearse" ]; then
    # Not under the name of measured results, which these are not.
    packed=gpu_suite_rehearsal
    recipe=$scratch/rehearsal.toml
    cat > "$recipe" << 'END'
base = "demo"
backbone = {name = "test_resnet"}
projector = {hidden = [32], out = 16}
predictor = {hidden = [32], out = 16}
END
    tiny=$recipe more_recipes=("$recipe")
    batch=4 batches=2 steps=2 repeats=1 num_images=4 photos=8 tiny_photos=8 tiny_batch=4 workers=1 threads=1
    batch_sizes=(4)
    photo_size=(--height 64 --width 64) sizes=(--size 32 --local-size 16 --blur-kernel 5)
    if [ "$device" = cpu ]; then # where compiling takes minutes
        ways=(captured "plain step" grouped "view by view") start=(--no-compiled)
        contenders=(fused native reference torchvision dali kornia)
    fi
fi
[ -f "$out/$packed.tgz" ] && tar xzf "$out/$packed.tgz" -C "$results" 2> /dev/null

save() { # write all results into one file; tar's exit code 1 is that a file changed meanwhile
    local part=$out/.$packed.$BASHPID
    (cd "$results" && tar czf "$part" -- *) || [ $? -eq 1 ] && mv "$part" "$out/$packed.tgz"
}
saver=
finish() {
    [ -n "$saver" ] && kill "$saver" 2> /dev/null
    rm -rf "$scratch" "$out/.$packed".*
}
trap finish EXIT
touch "$scratch/saved" "$results/suite.log"
(while sleep 5 && kill -0 $$; do
    if [ -n "$(find "$results" -type f -newer "$scratch/saved" | head -n 1)" ]; then touch "$scratch/saved" && save; fi
done) > /dev/null 2>&1 &
saver=$!

now() { if [ -n "${CLOCK:-}" ]; then cat "$CLOCK"; else printf '%s' "$SECONDS"; fi; }
say() { printf '%s\n' "$*" | tee -a "$results/suite.log" >&2; }
failed=0 ran=0 later=

within() { # within SECONDS: sets `limit`, the seconds that a command may take from now on, at most so many
    most=$1
    limit=$((in_all - $(now)))
    limit=$((limit < 1 ? 1 : limit < most ? limit : most))
    enough=$((limit * 8 / 10)) # after which a benchmark begins no further trial
}

begin() { # begin PART LEAST MOST: whether there is time for it
    case " $parts " in *" $1 "*) ;; *) return 1 ;; esac
    local left=$((in_all - $(now)))
    if [ "$left" -lt "$2" ]; then
        later="$later $1"
        say "--- $1 is skipped: $left s are left of $in_all, it takes $2 or more"
        return 1
    fi
    within "$3"
    say "--- $1, at most $limit s, $(now) s after the start"
    ran=1
}

run() { # run NAME COMMAND...: for `limit` seconds at most
    local name=$1 code=0
    shift
    timeout --kill-after=10 "$limit" "$@" > /dev/null 2> >(tee -a "$results/suite.log" >&2) || code=$?
    if [ "$code" -ne 0 ]; then
        say "FAILED: $name (exit code $code)"
        failed=1
    fi
    save
}

data=$(at "${DATA:-}")
if [ -z "${DATA:-}" ]; then
    data=$scratch/synthetic_500x375
    limit=60 run "synthetic photos" "$python" -m benchmarks.harness.synthetic_photos "$data" --count "$photos" \
        ${photo_size[@]+"${photo_size[@]}"}
fi

shards=
convert() { # once, into shards; data that takes more than a minute is read as it is
    [ -n "$shards" ] && return
    shards=$scratch/shards
    if ! timeout --kill-after=10 "$((limit < 60 ? limit : 60))" "$python" -m mvssl.cli.convert "$data" "$shards" > /dev/null 2>> "$results/suite.log"; then
        say "DATA is read as it is: it could not be converted into shards within a minute, or is converted already."
        shards=$data
    fi
    within "$most"
}

views() { # views DTYPE
    run "views in $1" "$python" -m benchmarks.bench_views "$data" --device "$device" --dtype "$1" \
        --num-images "$num_images" --repeats "$repeats" --threads "$threads" --seconds "$enough" \
        --out "$results/views_${device}_$1.json" ${sizes[@]+"${sizes[@]}"} \
        ${contenders[@]+--contenders "${contenders[@]}"}
}

if begin step 60 330; then
    run step "$python" -m benchmarks.bench_step --recipes "$recipe" --batch-sizes $batch --device "$device" \
        --contenders captured "plain step" --steps $steps --repeats 3 --seconds "$enough" \
        --out "$results/step_$device.json"
fi
if begin loader 40 100; then
    convert
    run loader "$python" -m benchmarks.bench_loader "$shards" --device "$device" --decoders $decoder --cache \
        --recipe "$recipe" --workers "$workers" --batch-size $batch --num-batches $batches --repeats 2 \
        --seconds "$enough" --out "$results/loader_$device.json"
fi
if begin training 60 120; then
    convert
    run training "$python" -m benchmarks.bench_train "$shards" --recipe "$recipe" --device "$device" \
        --decoder $decoder --workers "$workers" --batch-size $batch --steps $steps --repeats 2 --seconds "$enough" \
        --out "$results/train_$device.json"
fi
if begin views 30 70; then views bfloat16; fi
if begin tests 60 180; then
    marked=$(grep -rl --include='*.py' 'mark\.gpu' tests)
    # A rehearsal without a GPU skips them all, which one process does soonest.
    case $found${rehearse:+$device} in *cpu) at_once=() ;; *xdist:yes*) at_once=(-n 5) ;; *) at_once=() ;; esac
    case $found in
        *tests:no*) say "The tests are left out: pytest or hypothesis is missing." ;;
        *) # without the options of pyproject.toml, which need plugins that may be missing
            # shellcheck disable=SC2086
            OMP_NUM_THREADS=2 run tests bash -c '"$@" > "$0" 2>&1' "$results/gpu_tests.txt" "$python" -m pytest -m gpu -q \
                -o addopts=-ra -p no:cacheprovider ${at_once[@]+"${at_once[@]}"} $marked
            say "$(tail -n 1 "$results/gpu_tests.txt")"
            ;;
    esac
fi
if begin steps 60 540; then
    convert
    run steps "$python" -m benchmarks.bench_step --recipes "${more_recipes[@]}" --batch-sizes "${batch_sizes[@]}" \
        --device "$device" --data "$shards" --steps $((steps / 2)) --repeats 2 --seconds "$enough" \
        --out "$results/steps_$device.json" ${ways[@]+--contenders "${ways[@]}"}
fi
if begin tiny 30 70; then
    run "small synthetic photos" "$python" -m benchmarks.harness.synthetic_photos "$scratch/synthetic_64" \
        --count $tiny_photos --height 64 --width 64
    run tiny "$python" -m benchmarks.bench_loader "$scratch/synthetic_64" --device "$device" --decoders $decoder --cache \
        --recipe "$tiny" --workers "$workers" --batch-size $tiny_batch --num-batches $((2 * batches)) --repeats 2 \
        --seconds "$enough" --out "$results/loader_tiny_$device.json"
fi
if begin kernels 15 90; then
    run "bytes of the kernels" bash -c '"$@" > "$0"' "$results/view_bytes.md" "$python" -m benchmarks.bench_micro bytes
    if [ "$device" = cuda ]; then
        run kernels "$python" -m benchmarks.bench_micro fused --num-images "$num_images" --seconds "$enough" \
            --out "$results/tune_fused.json"
    fi
fi
if begin views32 30 70; then views float32; fi
if begin start 30 400; then
    run start "$python" -m benchmarks.bench_start --recipe "$recipe" --device "$device" --batch-size $batch \
        ${start[@]+"${start[@]}"} --out "$results/start_$device.json"
fi

kill "$saver" 2> /dev/null
wait "$saver" 2> /dev/null
saver=
[ -n "$later" ] && say "No time was left for:$later. The same command with these names runs them."
save || failed=1
printf 'Results: %s in %s\n' "$(tar tzf "$out/$packed.tgz" | wc -l)" "${OUT:-.}/$packed.tgz"
[ "$ran" -eq 1 ] || failed=1
exit "$failed"
