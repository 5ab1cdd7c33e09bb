#!/usr/bin/env bash
# What a GPU is asked: tests, speed, and a short training of `60m` beside its twins and the control.
#
#   lab/gpu.sh OUT [DATA]       DATA: a folder that prepare_pile.py has written; train.py's own if left out
#
# A call ends within nine minutes. What it had no time for, the same call does next time, where training goes
# on from its checkpoint; what failed is tried again. STAGES="bench train" leaves the tests out. OUT holds a
# log, JSON and an archive; checkpoints are in RUNS. For a CPU: other flags in SHAPES, BENCH, TRAIN.
set -uo pipefail
out=$(realpath -m "${1:?name a folder for what comes out}") || exit 1
data=${2:+"--data '$(realpath -m "$2")'"}
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
    step tests tests $python -m pytest test_leviathan.py tests/test_gpu.py tests/test_bench.py
    for shape in ${SHAPES:-256x6 1024x12}; do
        step bench "bench-$shape" $python bench.py --shape "$shape" --rounds 5 \
            --json "$out/bench-$shape.json" ${BENCH:-}
    done
    step train 60m $python -m lab.campaign --experiments first-run --seeds 1 --out "$runs" \
        --train "$data --preset 60m --tokens-per-step 32768 --steps 640 --warmup-steps 256 \
        --learning-rate 3e-3 --eval-every 160 --eval-tokens 524288 ${TRAIN:-}"
    tar czf "$out/60m.tar.gz" -C "$runs" --exclude='*.pt' --exclude=tokenizer.json . 2> /dev/null
}
all 2>&1 | tee -a "$out/log.txt"
