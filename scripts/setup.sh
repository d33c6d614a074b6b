#!/usr/bin/env bash
# Makes the virtual environment of the Makefile: torch, the extras of this checkout (by default those that development
# needs), and the checkout itself, editable. It compiles nothing: `make build` does, where its progress is seen.
# usage: PYTHON=python3 TORCH=torch==2.13.0 CONSTRAINTS=constraints.txt scripts/setup.sh .venv [EXTRAS]
# With CONSTRAINTS empty everything but torch is the newest release that the ranges of pyproject.toml allow.
set -euo pipefail
venv=$1
extras=${2:-demo,vqa,bench,test,lint,abi}

fail() {
  echo "setup: $1" >&2
  exit 1
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$PYTHON is not a Python >= 3.10; choose another one with make PYTHON=..."
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$PYTHON cannot make virtual environments: install its venv module (python3-venv on Debian and Ubuntu)"
if [[ -z ${CXX:-} ]] && ! command -v g++ >/dev/null && ! command -v c++ >/dev/null; then
  echo "setup: no C++ compiler (g++), going on without compiled kernels" >&2
fi

echo "setup: $venv with $("$PYTHON" --version)"
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear "$venv"
# The pip and setuptools of Python 3.10 and 3.11 are too old for pyproject.toml.
constraints=$venv/constraints.txt
grep -v '^triton==' "${CONSTRAINTS:-/dev/null}" >"$constraints" || true
# Of thousands of modules few are ever imported: Python compiles those, where it may keep what it compiled.
lazily=$([[ -n ${PYTHONDONTWRITEBYTECODE:-} ]] || echo --no-compile)
install() { "$venv/bin/python" -m pip install -q $lazily -c "$constraints" "$@"; }
install --upgrade pip 'setuptools>=77' 'ninja>=1.11'

echo "setup: $TORCH"
install "$TORCH" 'numpy>=1.26'
# A torch with CUDA brings the Triton it was made for, which a pin of ours must not exchange.
"$venv/bin/python" -c 'import importlib.metadata as m; assert any(r.startswith("triton") for r in m.requires("torch"))' \
  2>/dev/null || grep '^triton==' "${CONSTRAINTS:-/dev/null}" >>"$constraints" || true
gpu=no
if command -v nvidia-smi >/dev/null || compgen -G '/dev/nvidia*' >/dev/null; then gpu=yes; fi
"$venv/bin/python" - "$gpu" <<'PYTHON'
import sys

import torch

if sys.argv[1] == "no" and torch.version.cuda:
    print("setup: this torch carries CUDA and there is no GPU; with pip pointed at a CPU index it would be much smaller")
PYTHON

echo "setup: this checkout with what it needs for $extras"
# setuptools warns of folders that shadow an editable package; here the folder is the package.
TOKENPRUNE_CPU=0 TOKENPRUNE_CUDA=0 PYTHONWARNINGS="ignore:Editable installation" \
  install -e ".[$extras]" --no-build-isolation
