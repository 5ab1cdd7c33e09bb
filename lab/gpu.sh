#!/usr/bin/env bash
# What a GPU is asked: tests, speed, and a short training of the twins on the same tokens.
#
#   lab/gpu.sh OUT [DATA]       DATA: a folder that prepare_pile.py has written; data/stdlib if left out
#
# A call ends within nine minutes. What it had no time for, the same call does next time, where training goes
# on from its checkpoint; what failed is tried again. STAGES="bench train" leaves the tests out. OUT holds a
# log and JSON, six files; checkpoints are in RUNS. For a CPU: other flags in SHAPES, BENCH, TRAIN.
set -uo pipefail
out=$(realpath -m "${1:?name a folder for what comes out}") || exit 1
data=$(realpath -m "${2:-data/stdlib}")
mkdir -p "$out" && touch "$out/log.txt" && cd "$(dirname "$0")/.." || exit 1
runs=${RUNS:-out/gpu} python=${PYTHON:-python3}

step() {        # stage, name, command ...
    local stage=$1 name=$2 left=$((500 - SECONDS)) status
    shift 2
    if [[ " ${STAGES:-tests bench train} " != *" $stage "* ]] || grep -qx "done: $name" "$out/log.txt"; then
        return
    elif ((left < 30)); then
        echo "$name: no time left, call again"
        return
    fi
    echo "---- $name: $*"
    timeout -k 30 "$left" "$@"
    status=$?
    case $status in
        0) echo "done: $name" ;;
        124 | 137) echo "$name: no time left, call again" ;;
        *) echo "$name: exit status $status" ;;
    esac
}

all() {
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null || echo "no GPU"
    step tests tests $python -m pytest test_leviathan.py tests/test_gpu.py tests/test_bench.py -p no:cacheprovider
    for shape in ${SHAPES:-256x6 1024x12}; do
        step bench "bench-$shape" $python bench.py --shape "$shape" --rounds 5 \
            --json "$out/bench-$shape.json" ${BENCH:-}
    done
    for model in dense dense-untied leviathan; do
        resume=$(compgen -G "$runs/$model/step-????????" > /dev/null && echo --resume)
        step train "train-$model" $python train.py --model $model --data "$data" --out "$runs/$model" \
            --preset 60m --steps 300 --warmup-steps 100 --tokens-per-step 65536 --eval-tokens 262144 \
            ${TRAIN:-} $resume
        cp "$runs/$model/log.jsonl" "$out/$model.jsonl" 2> /dev/null
    done
}
all 2>&1 | tee -a "$out/log.txt"
