#!/usr/bin/env bash
# Makes the virtual environment of the Makefile: torch, the development tools, and this checkout, editable.
# usage: PYTHON=python3 TORCH=torch==2.13.0 scripts/setup.sh .venv
set -euo pipefail
venv=$1

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
# The pip and setuptools of Python 3.10 and 3.11 are too old for pyproject.toml; ninja compiles the editable install.
"$venv/bin/python" -m pip install -q --upgrade pip 'setuptools>=77' 'ninja>=1.11'

echo "setup: $TORCH"
"$venv/bin/python" -m pip install -q "$TORCH" 'numpy>=1.26'
gpu=no
if command -v nvidia-smi >/dev/null || compgen -G '/dev/nvidia*' >/dev/null; then gpu=yes; fi
"$venv/bin/python" - "$gpu" <<'PYTHON'
import sys

import torch

if sys.argv[1] == "no" and torch.version.cuda:
    print("setup: this torch carries CUDA and there is no GPU; with pip pointed at a CPU index it would be much smaller")
PYTHON

echo "setup: development tools and this checkout"
# setuptools warns of folders that shadow an editable package; here the folder is the package.
PYTHONWARNINGS="ignore:Editable installation" "$venv/bin/python" -m pip install -q -e '.[demo,vqa,bench,test,lint,abi]' --no-build-isolation
