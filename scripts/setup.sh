#!/usr/bin/env bash
# Builds .venv with everything that `make demo` and `make test` need. Quick when nothing has changed.
# Environment: PYTHON chooses the interpreter, CXX the compiler that torch.compile uses (g++ unless set).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*"; }

stamp=.venv/.setup-stamp
wanted="$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1) $PWD"
if [[ -x .venv/bin/python && -f $stamp && "$(cat $stamp)" == "$wanted" ]]; then
    say ".venv is up to date"
    exit 0
fi

missing=()

# A usable Python: new enough, able to make a venv, with the headers that compiled kernels include.
probe_python='
import os, sys, sysconfig
if sys.version_info < (3, 10): print("version " + sys.version.split()[0] + " is older than 3.10"); sys.exit()
try: import venv, ensurepip
except ImportError as error: print(f"no module {error.name}: install the package python3-venv"); sys.exit()
if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")): print("no Python.h: install the package python3-dev")'
python=""
reasons=()
candidates=(python3 python3.13 python3.12 python3.11 python3.10)
[[ -n ${PYTHON:-} ]] && candidates=("$PYTHON")
for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null || continue
    reason="$("$candidate" -c "$probe_python" 2>/dev/null)" || continue
    if [[ -z $reason ]]; then
        python="$("$candidate" -c 'import sys; print(sys.executable)')"
        break
    fi
    reasons+=("$candidate: $reason")
done
if [[ -z $python ]]; then
    missing+=("Python 3.10 or newer with venv and headers (Debian, Ubuntu: apt install python3 python3-venv python3-dev); looked for: ${candidates[*]}")
    for reason in ${reasons[@]+"${reasons[@]}"}; do missing+=("  $reason"); done
fi

# torch.compile builds its CPU kernels with $CXX, or g++ when that is unset, and with OpenMP.
compiler="${CXX:-}"
for candidate in g++ clang++; do
    [[ -z $compiler ]] && command -v "$candidate" >/dev/null && compiler="$candidate"
done
if [[ -z $compiler ]]; then
    missing+=("a C++ compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)")
elif ! error="$(printf '#include <omp.h>\n#include <vector>\nint main() { return omp_get_max_threads() < 1; }\n' |
    "$compiler" -x c++ -std=c++17 -fopenmp - -o /dev/null 2>&1)"; then
    reason="$(grep -m1 -iE 'error|not found' <<<"$error" || echo "nothing, and fails")"
    missing+=("a C++ compiler that builds OpenMP programs (apt install g++, or libomp-dev beside clang++): $compiler says: $reason")
elif [[ $compiler == clang++ && -z ${CXX:-} ]]; then
    say "g++ is not here and torch.compile looks for it: run 'export CXX=clang++' before using the library outside make"
fi

# FlexAttention's CPU kernels exist for Linux on x86-64 with AVX2 alone.
if [[ "$(uname -s)" != Linux ]]; then
    missing+=("Linux: FlexAttention has no CPU kernels on $(uname -s)")
elif ! grep -qw avx2 /proc/cpuinfo; then
    missing+=("a processor with AVX2: /proc/cpuinfo lists no 'avx2' flag (on a virtual machine, pass the host's CPU flags through)")
fi

if ((${#missing[@]})); then
    echo "setup: this machine lacks:" >&2
    printf '  %s\n' "${missing[@]}" >&2
    exit 1
fi
say "$("$python" --version) at $python, compiler $compiler, AVX2: all found"

# A venv that was moved or copied, or whose Python is gone, cannot be repaired: start it again.
if ! .venv/bin/pip --version >/dev/null 2>&1 || ! grep -qF "$PWD/.venv/bin/python" .venv/bin/pip; then
    say "making .venv"
    "$python" -m venv --clear .venv
fi
rm -f "$stamp"
# --no-compile: only what is imported gets compiled, on first use, which is much less.
pip=(.venv/bin/pip --disable-pip-version-check install --no-compile --constraint constraints.txt)
[[ -t 1 ]] || pip+=(--quiet) # no progress bars in a log
say "installing torch (a few hundred MB; more where the wheel brings CUDA)"
"${pip[@]}" torch
say "installing flexprefill-fa, editable, with the extras hf and dev"
"${pip[@]}" --editable '.[hf,dev]'
echo "$wanted" >"$stamp"
say "done"
