"""scripts/kernel_coverage.py finds lines and instantiations that no test ran."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts import kernel_coverage as script

COMPILER = os.environ.get("CXX") or "g++"
pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None or shutil.which("gcov") is None, reason="no g++ with gcov"
)
HEADER = """\
#pragma once
inline volatile int negatives = 0;
template <class T>
int sign(T x) {
  if (x < 0)
    return negatives = -1;
  return x > 0;
}
"""


def run_gaps(folder: Path, body: str, runs: int = 1) -> list[str]:
    """The gaps that a program leaves in kernels/sign.cuh; it takes a number of arguments as input."""
    kernels, counts, copy = folder / "kernels", folder / "counts", folder / "copy"
    for each in (kernels, counts, copy):
        each.mkdir()
    (kernels / "sign.cuh").write_text(HEADER)
    (folder / "main.cpp").write_text(f'#include "kernels/sign.cuh"\nint main(int n, char**) {{ {body} }}\n')
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "--coverage", "-c", "../main.cpp", "-o", "main.o"], cwd=counts, check=True
    )
    subprocess.run([COMPILER, "--coverage", "main.o", "-o", "main"], cwd=counts, check=True)
    for i in range(runs):
        subprocess.run([counts / "main", *["more"] * i], check=True)
    return script.gaps(script.gcov_files(counts, copy), kernels, folder)


def test_full_coverage_has_no_gaps(tmp_path):
    assert run_gaps(tmp_path, "return sign(n) + sign(-n) + sign(-1.0 * n) + 1;") == []


def test_counts_of_several_processes_add_up(tmp_path):
    """The first run has one argument, the second two."""
    assert run_gaps(tmp_path, "return n == 1 ? sign(-n) + 1 : sign(n) - 1;", runs=2) == []


def test_a_line_that_never_ran_is_named(tmp_path):
    assert run_gaps(tmp_path, "return sign(n) - 1;") == ["kernels/sign.cuh:6: never executed: return negatives = -1;"]


def test_exempted_lines_are_not_named(tmp_path, monkeypatch):
    monkeypatch.setitem(script.EXEMPT, ("sign.cuh", "negatives = -1"), "for the test")
    assert run_gaps(tmp_path, "return sign(n) - 1;") == []


def test_an_instantiation_that_never_ran_is_named(tmp_path):
    """Its lines ran with another type."""
    (gap,) = run_gaps(tmp_path, "return (n > 9 ? sign(1.0 * n) : sign(n) + sign(-n));")
    assert gap == "kernels/sign.cuh:4: this instantiation never ran: int sign<double>(double)"


def test_a_header_that_nothing_includes_is_named(tmp_path):
    kernels = tmp_path / "kernels"
    found = run_gaps(tmp_path, "return sign(n) + sign(-n);")
    assert found == []
    (kernels / "forgotten.cuh").write_text("int f() {\n  return 1;\n}\n")
    files = script.gcov_files(tmp_path / "counts", tmp_path / "copy")
    assert script.gaps(files, kernels, tmp_path) == ["kernels/forgotten.cuh: no test compiles and runs anything of it"]


def test_no_counts_at_all_are_an_error(tmp_path):
    with pytest.raises(SystemExit, match="did the emulated tests run"):
        script.gaps([], tmp_path)
