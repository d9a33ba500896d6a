#!/usr/bin/env bash
# Every Triton kernel on small shapes under compute-sanitizer: memcheck (reads and writes outside of allocations) and
# racecheck (threads of a block that meet in shared memory). Needs GPUs and CUDA's compute-sanitizer. Parts of the
# shapes run side by side, on all GPUs in turn; each prints a JSON line, its log stays where it found something.
# Environment: PYTHON chooses the interpreter, SANITIZER the program, TOOLS what runs ("memcheck racecheck" unless set),
# PARTS which parts ("0 3", all unless set; `every_kernel.py --parts` lists them), JOBS how many at a time (one for each
# core), SECONDS_EACH when one is given up (600), LOGS a folder for the logs (one in /tmp).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export SANITIZER=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
if [[ ! -x $SANITIZER ]]; then
    echo "sanitize: no compute-sanitizer on PATH or in /usr/local/cuda/bin: install CUDA's, or name it with SANITIZER=" >&2
    exit 2
fi
export PYTHON=${PYTHON:-python} SECONDS_EACH=${SECONDS_EACH:-600} LOGS=${LOGS:-$(mktemp -d)}
# One allocation for each tensor: in the caching allocator's large ones a neighbour hides what lies outside.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
jobs=${JOBS:-$(nproc)}
GPUS=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
export GPUS=$((GPUS > 0 ? GPUS : 1))
mkdir -p "$LOGS"
"$PYTHON" scripts/every_kernel.py --parts >"$LOGS/parts"
parts=${PARTS:-$(cut -d' ' -f1 "$LOGS/parts")}

part() { # TOOL PART: one JSON line; fails where something was found or it did not end
    local tool=$1 number=$2 log="$LOGS/$1-$2" start=$SECONDS status=0 errors=null problem=null
    local under=()
    if [[ $tool != compile ]]; then
        under=("$SANITIZER" --tool "$tool" --error-exitcode 9 --print-limit 20)
    fi
    CUDA_VISIBLE_DEVICES=$((number % GPUS)) timeout "$SECONDS_EACH" "${under[@]}" \
        "$PYTHON" scripts/every_kernel.py "$number" >"$log" 2>&1 || status=$?
    if ! grep -q '^every kernel was launched' "$log" && [[ $status != 9 ]]; then
        problem="\"exit status $status, see $log\""
    elif [[ $tool == memcheck ]]; then
        errors=$(sed -n 's/.*ERROR SUMMARY: \([0-9]*\) error.*/\1/p' "$log" | tail -1)
    elif [[ $tool == racecheck ]]; then
        errors=$(sed -n 's/.*RACECHECK SUMMARY: \([0-9]*\) hazard.*/\1/p' "$log" | tail -1)
    fi
    if [[ $tool != compile || $problem != null ]]; then
        printf '{"tool": "%s", "part": "%s", "errors": %s, "problem": %s, "seconds": %d}\n' "$tool" \
            "$(sed -n "s/^$number //p" "$LOGS/parts")" "${errors:-null}" "$problem" $((SECONDS - start))
    fi
    [[ $status == 0 && $problem == null && (${errors:-none} == 0 || $tool == compile) ]]
}
export -f part

# Compiled without the sanitizer first, which then finds the kernels in Triton's cache.
failed=0
printf '%s\n' $parts | xargs -P "$jobs" -I{} bash -c 'part compile {}' || failed=1
for tool in ${TOOLS:-memcheck racecheck}; do printf "$tool %s\n" $parts; done |
    xargs -P "$jobs" -L1 bash -c 'part "$0" "$1"' || failed=1
if ((failed)); then
    echo "sanitize: found something, logs in $LOGS" >&2
    exit 1
fi
echo "sanitize: nothing found"
