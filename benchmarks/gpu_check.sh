#!/usr/bin/env bash
# Build, contract tests and benchmarks on a GPU machine that has torch but no network: under 10 minutes.
#
#   OUT=DIR benchmarks/gpu_check.sh      log, CSV and chart go to DIR (default: benchmarks/results)
#   PYTHON=...                           the interpreter whose torch is used (default: python3)
#   COMMIT=...                           what the CSV calls the tree where that is no git repository
#
# Every stage runs, whatever became of those before it; the exit status is not 0 if one was red.
set -uo pipefail # not -e: a red stage must not hide what the later ones have to say

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
cd -- "$ROOT" || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p -- "$OUT" || exit 1
OUT=$(cd -- "$OUT" && pwd) || exit 1
LOG="$OUT/gpu_check.log"
: >"$LOG" || exit 1
DEADLINE=580 # seconds for everything; a stage gets what is left of them at most

# The tree itself is what is tested: nothing is installed, so nothing is fetched.
export PYTHONPATH="$ROOT:$ROOT/python${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
# A cache from another torch or an older kernel must not stand in for this one.
CACHE=$(mktemp -d) || exit 1
trap 'rm -rf -- "$CACHE"' EXIT
export TORCHINDUCTOR_CACHE_DIR="$CACHE/inductor" TRITON_CACHE_DIR="$CACHE/triton"

summary=()
red=0

note() { # note COLOUR TEXT: a line of the summary
    summary+=("$(printf '%-6s %s' "$1" "$2")")
    [[ $1 == green ]] || red=1
}

stage() { # stage NAME SECONDS COMMAND...: run under a time limit, remember how it ended
    local name=$1 limit=$2 status started=$SECONDS left=$((DEADLINE - SECONDS))
    shift 2
    ((limit <= left)) || limit=$left
    if ((limit < 5)); then
        note RED "$name: not run, no time left"
        return
    fi
    echo "== $name (at most $limit s)" | tee -a -- "$LOG"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a -- "$LOG"
    status=${PIPESTATUS[0]}
    case $status in
        0) note green "$name, $((SECONDS - started)) s" ;;
        124 | 137) note RED "$name: stopped after $limit s" ;;
        *) note RED "$name: exit status $status, $((SECONDS - started)) s" ;;
    esac
}

device='
import sys, torch
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU here")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "python", sys.version.split()[0])
'

stage device 60 "$PYTHON" -c "$device"
stage build 120 "$PYTHON" setup.py build_ext --inplace
stage config 60 "$PYTHON" -m hvae_kernels

missing=
for module in pytest hypothesis; do
    "$PYTHON" -c "import $module" >/dev/null 2>&1 || missing+=" $module"
done
if [[ -n $missing ]]; then
    note RED "tests: not run, this Python lacks:$missing"
else
    # What runs on the GPU; CI has the CPU's rows. Several processes, where pytest can: compilers are most of the time.
    workers=()
    if "$PYTHON" -c "import xdist" >/dev/null 2>&1; then workers=(--numprocesses 6 --dist worksteal); fi
    stage tests 240 "$PYTHON" -m pytest tests/test_contract.py -k cuda -q --maxfail=20 -p no:cacheprovider "${workers[@]}"
fi

stage benchmarks 200 "$PYTHON" benchmarks/run.py --device cuda --out "$OUT"
stage breakdown 40 "$PYTHON" benchmarks/run.py --device cuda --breakdown
stage graphs 90 "$PYTHON" benchmarks/run.py --device cuda --quick --graphs --out "$OUT/graphs"

{
    echo
    echo "== summary"
    printf '%s\n' "${summary[@]}"
} | tee -a -- "$LOG"
exit "$red"
