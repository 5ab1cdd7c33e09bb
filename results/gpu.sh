#!/usr/bin/env bash
# What a GPU is asked, in one go: tests, speed, and paired trainings. Limits below: what a part has not done by then is left out.
#
#   results/gpu.sh OUT DATA [small]     DATA: a folder that prepare_pile.py has written; small: a rehearsal for a CPU
#
# Nothing is fetched. PARTS="tests speed" leaves the quality out, which goes on where it was when called again with the same
# OUT. A part that fails says so in OUT/summary.txt, and the others run all the same.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) data=$(cd "$2" && pwd) small=${3:-}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

wanted() { [[ " ${PARTS:-tests speed quality} " == *" $1 "* ]]; }

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
    seeds=1
else
    speed="--rounds 5"
    training="--preset 60m --steps 600 --tokens-per-step 65536 --eval-every 100 --eval-tokens 262144"
    seeds=3
fi

wanted tests && part tests 400 $python -m pytest test_leviathan.py tests/test_speed.py -p no:cacheprovider
wanted speed && part speed 900 $python bench.py speed $speed --json "$out/speed.json" --plots "$out"
wanted quality && part quality 1800 $python bench.py quality --experiments vocabulary iso-body digits --seeds $seeds --minutes 24 \
    --out "$out/quality" \
    --train "--data '$data' $training"
