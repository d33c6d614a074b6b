"""Threads of the CPU greedy ops: one barrier per call, no waiting for threads that others keep from running."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenprune_kernels as tp
from testing import ROOT
from testing.cases import BACKENDS

TEAM = Path(__file__).with_name("team")
CXX = os.environ.get("CXX", "g++").split()

needs_compiler = pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"needs {CXX[0]}")
needs_library = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled CPU kernels")
# Long enough for several threads: tokens x channels x picks are the multiply-adds that a team counts.
TOKENS, CHANNELS, PICKS = 700, 1024, 256
KINDS = [("max", "outlier"), ("max", "isolated"), ("sum", "outlier")]
COUNTER = """
#include <dlfcn.h>
static int calls;
int parallel_regions(void) { return calls; }
void GOMP_parallel(void (*f)(void*), void* data, unsigned threads, unsigned flags) {
  static void (*real)(void (*)(void*), void*, unsigned, unsigned);
  if (!real) real = (void (*)(void (*)(void*), void*, unsigned, unsigned))dlsym(RTLD_NEXT, "GOMP_parallel");
  ++calls;
  real(f, data, threads, flags);
}
"""


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that checks the team, under ThreadSanitizer."""
    program = tmp_path_factory.mktemp("team") / "team"
    include = [f"-I{TEAM / 'include'}", f"-I{ROOT / 'csrc'}"]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*CXX, *flags, *include, str(TEAM / "main.cpp"), "-o", str(program)], check=True)
    return program


@needs_compiler
@pytest.mark.parametrize("late", [False, True], ids=["all threads there", "others come after the end"])
def test_a_team_shares_work_and_waits_for_no_thread_that_has_none(team: Path, late: bool) -> None:
    """With a barrier per step, the second case would never end."""
    # Address-space randomisation of recent kernels is more than the sanitizer of GCC 12 can map.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*fixed, str(team), *(["late"] if late else [])], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def picks(aggregate: str, first: str, threads: int) -> torch.Tensor:
    features = torch.randn(1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        potential = "cosine" if aggregate == "max" else "riesz"
        options = {"aggregate": aggregate, "first": first, "potential": potential}
        return tp.repulsion_sample(features, PICKS, backend="cpu", **options)[0]
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize(("aggregate", "first"), KINDS)
def test_any_number_of_threads_picks_the_same(aggregate: str, first: str) -> None:
    one = picks(aggregate, first, 1)
    for threads in (2, 3, 7):
        assert torch.equal(picks(aggregate, first, threads), one)


@needs_library
@needs_compiler
def test_threads_synchronise_once_in_a_call(tmp_path: Path) -> None:
    """Not once in a step: under load every barrier lasts until the scheduler has brought all threads back."""
    (tmp_path / "counter.c").write_text(COUNTER)
    counter = tmp_path / "counter.so"
    subprocess.run([*CXX, "-x", "c", "-shared", "-fPIC", str(tmp_path / "counter.c"), "-o", str(counter), "-ldl",
                    "-D_GNU_SOURCE"], check=True)  # fmt: skip
    script = f"""
import ctypes, torch
from tests.ops import test_cpu_threads as here
regions = ctypes.CDLL({str(counter)!r}).parallel_regions
torch.set_num_threads(2)
torch.ones(1 << 20).exp_()
assert regions() > 0, "torch starts its threads by another function: this test counts nothing"
for kind in here.KINDS:
    here.picks(*kind, threads=2)
    before = regions()
    here.picks(*kind, threads=2)
    print(regions() - before)
"""
    environment = {**os.environ, "LD_PRELOAD": str(counter), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"] * len(KINDS)
