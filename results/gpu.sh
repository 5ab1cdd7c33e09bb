#!/usr/bin/env bash
# What a GPU is asked, in one go: tests, speed, and a short training of each twin. About 25 minutes on one H100.
#
#   results/gpu.sh OUT DATA [small]     DATA: a folder that prepare_pile.py has written; small: a rehearsal for a CPU
#
# Nothing is fetched. PARTS="tests speed" leaves the training out. A part that fails says so in OUT/summary.txt, and the
# others run all the same.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) data=$(cd "$2" && pwd) small=${3:-}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

wanted() { [[ " ${PARTS:-tests speed train} " == *" $1 "* ]]; }

part() {        # name, seconds, command ...: its output goes to OUT/name.txt
    local name=$1 limit=$2 begun=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$out/$name.txt" 2>&1
    echo "$name: exit status $? after $((SECONDS - begun)) s: $*" | tee -a "$out/summary.txt"
}

{ nvidia-smi || echo "no NVIDIA GPU"; $python -c 'import sys, torch; print(sys.version, torch.__version__)'; } > "$out/machine.txt" 2>&1

if [ -n "$small" ]; then
    speed="--vocab-size 3000 --tokens 256 --seq-len 64 --shapes 64x2 --rounds 1 --sections models pieces"
    training="--seq-len 64 --d-model 64 --n-layers 2 --tokens-per-step 512 --steps 10 --eval-tokens 2048"
else
    speed="--rounds 5"
    training="--preset 60m --steps 400 --tokens-per-step 65536 --warmup-steps 100 --eval-tokens 262144"
fi

wanted tests && part tests 400 $python -m pytest test_leviathan.py tests/test_speed.py -p no:cacheprovider
wanted speed && part speed 900 $python bench.py speed $speed --json "$out/speed.json" --plots "$out"
for model in $(wanted train && echo leviathan dense dense-untied); do
    part "train-$model" 240 $python train.py --model $model --data "$data" --out "$runs/$model" $training
    cp "$runs/$model/log.jsonl" "$out/$model.jsonl"
    cp "$runs/$model/curves.png" "$out/$model.png"
done
