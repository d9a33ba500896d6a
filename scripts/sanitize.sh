#!/usr/bin/env bash
# Every Triton kernel on small shapes under compute-sanitizer: memcheck (reads and writes outside of allocations), then
# racecheck (threads of a block that meet in shared memory). Needs a GPU and CUDA's compute-sanitizer.
# Environment: PYTHON chooses the interpreter, SANITIZER the program, TOOLS what runs ("memcheck racecheck" unless set).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sanitizer=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
if [[ ! -x $sanitizer ]]; then
    echo "sanitize: no compute-sanitizer on PATH or in /usr/local/cuda/bin: install CUDA's, or name it with SANITIZER=" >&2
    exit 2
fi
python=${PYTHON:-python}
# One allocation for each tensor: in the caching allocator's large ones a neighbour hides what lies outside.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Compiled once without the sanitizer, which then finds them in Triton's cache.
"$python" scripts/every_kernel.py
for tool in ${TOOLS:-memcheck racecheck}; do
    echo "sanitize: $tool"
    "$sanitizer" --tool "$tool" --error-exitcode 1 --print-limit 20 "$python" scripts/every_kernel.py
done
echo "sanitize: nothing found"
