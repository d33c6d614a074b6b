#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer into a throw-away copy of the repository
# and runs the tests that reach into every corner of them: contract, errors, boundary and fuzz (100,000 malformed calls
# in all), once per CPU capability. Then all tests of the CUDA kernels, on an emulator built with AddressSanitizer.
#
#   bash scripts/sanitize.sh [pytest arguments]     PYTHON=python  CAPABILITIES="avx512 avx2 baseline"
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git -C "$root" ls-files --cached --others --exclude-standard -z | tar -C "$root" --null --ignore-failed-read -T - -cf - | tar -C "$copy" -xf -
cd "$copy"
ln -sfn ../python_ref tokenprune_kernels/reference  # what an installation maps

TOKENPRUNE_SANITIZE=1 TOKENPRUNE_CPU=1 TOKENPRUNE_CUDA=0 "$python" setup.py -q build_ext --inplace

TOKENPRUNE_EMULATOR_SANITIZE=1 "$python" -m emulator  # compilers are slow below the runtime

library() { "${CXX:-g++}" -print-file-name="$1"; }
# Python itself is not instrumented: the runtime comes first, and what the interpreter keeps until exit is no leak.
# An allocation that is too large returns null, as it does without the sanitizer: the fuzz tests ask for some.
# libstdc++ comes along, because the runtime looks for its __cxa_throw when it starts.
export LD_PRELOAD="$(library libasan.so) $(library libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=16384:detect_odr_violation=1:strict_init_order=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH=$copy PYTHONMALLOC=malloc TOKENPRUNE_POISON=1

# A library that does not load would leave everything to the references, which are not what is to be sanitized.
"$python" -c "import tokenprune_kernels._C"

export TOKENPRUNE_FUZZ_CALLS=${TOKENPRUNE_FUZZ_CALLS:-100000}
for capability in ${CAPABILITIES:-avx512 avx2 baseline}; do
  echo "== sanitized tests, TOKENPRUNE_CPU_CAPABILITY=$capability"
  # The CUDA kernels have their own turn below, and Triton's interpreter is not sanitized. Without capturing file
  # descriptors: a sanitizer report goes to stderr of a process that then ends.
  TOKENPRUNE_TEST_BACKENDS=cpu,reference TOKENPRUNE_CPU_CAPABILITY=$capability \
    "$python" -m pytest -q -p no:cacheprovider --capture=sys \
    tests/ops/test_{contract,contract_memory,errors,boundary,fuzz}.py "$@"
  export TOKENPRUNE_FUZZ_CALLS=5000  # the first capability had them all
done

echo "== sanitized tests of the CUDA kernels on the emulator"
export TOKENPRUNE_EMULATOR_SANITIZE=1
"$python" -m pytest -q -p no:cacheprovider --capture=sys tests --ignore=tests/package/test_build.py \
  -k "emulator or cuda" "$@"
