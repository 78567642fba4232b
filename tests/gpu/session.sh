#!/usr/bin/env bash
# Everything that waits for a GPU, in one call of at most nine minutes.
#
#   OUT=results bash tests/gpu/session.sh           on a machine with a CUDA device
#   DRY=1 OUT=/tmp/dry bash tests/gpu/session.sh    the same with tiny settings on a CPU, within some minutes
#
# 1. machine.txt              card, driver, versions
# 2. bench.json, bench.txt    a step at batch 512: plain and full, eager, recorded and compiled; 1, 2 and 4 runs at once
# 3. tests.txt                the tests that need a CUDA device
# 4. paper/, paper.txt        the preset paper, seed 0, until the time is over; RESUME=folder continues that of an
#                             earlier call, and SETTINGS="--seed 1" is another run
#
# Expects: a Python with the packages of requirements.lock: $PYTHON, or .venv/bin/python, or the first python3 (packages
# it lacks are taken from wheels/ where that is there: `pip download -r requirements.lock -d wheels`, without torch's).
# A C++ compiler and Triton, to compile. For part 4, CIFAR-10 (cifar-10-batches-py) in $DATA_ROOT, by default data.
# Nothing is downloaded. Every part runs whatever became of those before it; the last lines say how each ended.
set -uo pipefail
cd "$(dirname "$0")/../.."

LIMIT=${LIMIT:-530} OUT=${OUT:-build/gpu} DATA_ROOT=${DATA_ROOT:-data} DRY=${DRY:-}
mkdir -p "$OUT"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
if [ -d wheels ]; then
    "$python" -m venv --system-site-packages /tmp/gpu-venv && python=/tmp/gpu-venv/bin/python
    "$python" -m pip install --quiet --no-index --find-links wheels --no-deps wheels/*.whl
fi

bench_seconds=240 tests_seconds=150
bench=(--images 51200 --rounds 10 --modes eager compile --at-once 1 2 4)
cuda_tests=(-m cuda tests/gpu tests/training tests/data/test_batches.py tests/export/test_packing.py)
paper=(--preset paper --data cifar10 --device cuda)
if [ -n "$DRY" ]; then
    bench_seconds=480
    bench=(--images 4 --batch-size 2 --rounds 1 --modes eager --at-once 1 2 --device cpu --no-memory)
    paper=(--preset paper --data digits --limit 60 --batch-size 15 --device cpu)
    PAPER_SECONDS=150
fi

ended=()
part() { # name, seconds, command: what it prints goes into name.txt; SIGTERM (status 143) when its seconds are over
    local name=$1 seconds=$2 status
    shift 2
    timeout --preserve-status --kill-after=20 "$seconds" "$@" >"$OUT/$name.txt" 2>&1
    status=$?
    ended+=("$name: status $status after $SECONDS s")
    tail -n 25 "$OUT/$name.txt"
}

part machine 30 sh -c 'nvidia-smi; "$0" -c "import torch; print(torch.__version__, torch.cuda.is_available())"' "$python"
part bench "$bench_seconds" "$python" -m experiments.bench training "${bench[@]}" --json "$OUT/bench.json"
part tests "$tests_seconds" "$python" -m pytest "${cuda_tests[@]}"

if [ -n "${RESUME:-}" ]; then
    mkdir -p "$OUT/paper" && cp -r "$RESUME/." "$OUT/paper/"
fi
resume=()
[ -e "$OUT/paper/checkpoint.pt" ] && resume=(--resume)
if [ -n "$DRY" ] || [ -d "$DATA_ROOT/cifar-10-batches-py" ]; then
    # shellcheck disable=SC2086  # several words are meant
    part paper "${PAPER_SECONDS:-$((LIMIT - SECONDS))}" "$python" -m experiments.debug_run "${paper[@]}" \
        --data-root "$DATA_ROOT" --baseline false --output "$OUT/paper" "${resume[@]}" ${SETTINGS:-}
else
    ended+=("paper: left out, $DATA_ROOT holds no CIFAR-10")
fi
printf '%s\n' "${ended[@]}" "in all $SECONDS s" | tee "$OUT/session.txt"
