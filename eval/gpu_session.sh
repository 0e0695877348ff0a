#!/usr/bin/env bash
# What to run first where a GPU is at hand, from the repository's root:
#   OUT=results bash eval/gpu_session.sh               all stages, in at most 8 minutes
#   STAGES="info right" bash eval/gpu_session.sh       some of them: info right times experts decode prune library pytest
# Needs torch and triton; `library` and `prune` what llmsparse needs, too. Whatever is found lies under $OUT at once:
# session.jsonl (a line a figure) and log. Each stage is a process of its own, with a limit in seconds, STRETCH times as
# long where the machine is slow; BUDGET is the seconds of all.
cd "$(dirname "$0")/.." || exit
export OUT=${OUT:-/tmp/gpu_session}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton_cache} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3} log="$OUT/log" begun=$SECONDS budget=${BUDGET:-480}
stages=${STAGES:-"info right times experts decode prune library pytest"}

run() { # LIMIT COMMAND…: at most that many seconds, and what is left of the budget
    local limit=$(($1 * ${STRETCH:-1})) left=$((budget - SECONDS + begun)) rc
    shift
    [ "$left" -ge 8 ] || { echo "== no time left: $*" | tee -a "$log"; return; }
    [ "$limit" -le "$left" ] || limit=$left
    echo "== $((SECONDS - begun)) s: $*" | tee -a "$log"
    timeout -k 5 "$limit" "$@" >>"$log" 2>&1
    rc=$?
    [ $rc = 0 ] || echo "== rc $rc: $*" | tee -a "$log"
}
stage() { local limit=$1; shift; run "$limit" "$python" -m eval.gpu_session "$@"; }
has() { [[ " $stages " == *" $1 "* ]]; }

has info && stage 60 info
if has right; then # side by side: compiling takes the CPUs, and `times` finds what was compiled
    for op in "mma24 1" "mma24 8" "mma24 16,32" "split24 1" "split24 8,16,32" "select24 1" "bitmask 1,8,16,32" "sell 1" \
        "join24 1,16,32" experts; do
        # shellcheck disable=SC2086
        (OMP_NUM_THREADS=1 stage 100 right $op) &
    done
    wait
fi
if has times; then
    stage 60 times 4096x14336 1
    stage 45 times 28672x8192 1
    stage 45 times 4096x14336 8
    stage 30 times 28672x8192 8
    stage 45 times 4096x14336 16,32
    stage 30 times 4096x4096 1,8
fi
has experts && stage 30 experts
has decode && stage 75 decode
has prune && stage 130 prune
has library && stage 60 library
# here a warning is no error: other versions than CI's may have some
has pytest && run "${PYTEST_LIMIT:-60}" "$python" -m pytest tests/triton_ops/test_gpu.py -q -m gpu -n 6 -p no:cacheprovider -W ignore --maxfail 60
echo "== done after $((SECONDS - begun)) s"
"$python" -m eval.gpu_session summary
