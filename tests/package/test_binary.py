"""The compiled library: every CPU capability computes the same, and wide instructions stay where they may run."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import tokenprune_kernels as tp
from testing import ROOT
from testing.process import printed

OBJECTS = sorted((ROOT / "build").glob("temp*/**/*.o"))
SIMD = [o for o in OBJECTS if o.parent.name == "simd"]
needs_library = pytest.mark.skipif(tp.config()["backends"]["cpu"] is not None, reason="no compiled library here")
needs_objects = pytest.mark.skipif(
    not SIMD or not shutil.which("objdump") or not shutil.which("nm"),
    reason="needs the object files of a build in place (build/temp*) and binutils",
)
CAPABILITIES = ("baseline", "avx2", "avx512")
# Registers that code for the baseline (SSE2) never names; zmm, masks and the upper sixteen are AVX-512 alone.
WIDE = {
    "baseline": re.compile(r"%[yz]mm|%k[0-7]|%xmm(1[6-9]|2\d|3[01])"),
    "avx2": re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])"),
}


def capability_of(path: Path) -> str:
    """rows.avx2.o -> avx2; everything outside csrc/cpu/simd is compiled for the baseline."""
    return path.suffixes[-2].removeprefix(".") if path in SIMD else "baseline"


def lines_of(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def capability_chosen(capability: str) -> str:
    """What a process that is asked for a capability takes."""
    ask = "import tokenprune_kernels as tp; print(tp.config()['compiled library']['cpu_capability'])"
    return printed("-c", ask, TOKENPRUNE_CPU_CAPABILITY=capability).strip()


@needs_library
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_agrees_with_the_reference(capability: str) -> None:
    """In a process of its own, because the choice is made once. Exact indices, floats by the tolerance rule."""
    if (chosen := capability_chosen(capability)) != capability:
        pytest.skip(f"this machine has no {capability}: it chose {chosen}")
    wanted = "(agrees_with or odd_dimensions or nan_feature or masked_padding) and cpu"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted, "tests/ops/test_contract.py"]
    assert " passed" in printed(*command, TOKENPRUNE_CPU_CAPABILITY=capability)


@needs_library
def test_an_unknown_capability_is_ignored() -> None:
    assert (
        capability_chosen("avx1024") == tp.config()["compiled library"]["cpu_capability"]
        or "TOKENPRUNE_CPU_CAPABILITY" in os.environ
    )


@needs_objects
@pytest.mark.parametrize("path", [o for o in OBJECTS if capability_of(o) in WIDE], ids=lambda p: p.name)
def test_wide_registers_are_used_by_their_capability_only(path: Path) -> None:
    forbidden = WIDE[capability_of(path)]
    offending = [line for line in lines_of("objdump", "-d", "--no-show-raw-insn", str(path)) if forbidden.search(line)]
    assert not offending, f"{len(offending)} instructions, the first: {offending[0]}"


@needs_objects
@pytest.mark.parametrize("path", SIMD, ids=lambda p: p.name)
def test_simd_objects_define_nothing_outside_their_namespace(path: Path) -> None:
    """The linker keeps one of several weak definitions of a name: it could be the one compiled for AVX-512."""
    home = f"tokenprune::{capability_of(path)}::"
    defined = [line.split(maxsplit=2)[1:] for line in lines_of("nm", "-C", "--defined-only", str(path))]
    shared = [(kind, name) for kind, name in defined if kind.isupper() or kind in "uvw"]
    assert any(home in name for _, name in shared), "an object that offers nothing is not what this test is about"
    outside = [f"{kind} {name}" for kind, name in shared if home not in name and not name.startswith("DW.ref.")]
    assert not outside


@needs_objects
def test_wide_code_is_built_at_all() -> None:
    built = {capability_of(o) for o in SIMD}
    assert built == set(tp.config()["compiled library"]["cpu_capabilities"].split(","))
    for path in SIMD:
        if capability_of(path) != "baseline":
            text = "\n".join(lines_of("objdump", "-d", str(path)))
            assert ("%zmm" if capability_of(path) == "avx512" else "%ymm") in text, path.name
