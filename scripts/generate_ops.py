"""Write csrc/generated/ops.h, the C++ half of the op descriptions: their schemas and argument checks.

usage: python -m scripts.generate_ops [--check]

The file is checked in, because a build must neither import torch nor the package it builds, and because a review shows
what a changed description does to C++. A test compares it with what this script would write.
"""

import argparse
import re

import torch

from testing import ROOT
from tokenprune_kernels._op import FLOATS, OPS, Argument, AtLeast, Choice, Count, Number, Op, TensorKind, compiled_ops

FILE = ROOT / "csrc" / "generated" / "ops.h"
TYPES = {
    "Tensor": "const Tensor&",
    "Tensor?": "const OptionalTensor&",
    "SymInt": "int64_t",
    "float": "double",
    "float?": "std::optional<double>",
    "bool": "bool",
    "str": "const std::string&",
}
SCALAR_TYPES = {torch.int64: "Long", torch.bool: "Bool"}
HEADER = """\
// Made by scripts/generate_ops.py from tokenprune_kernels/ops; do not edit.
// The schemas of the ops that have compiled kernels, and the checks of their arguments.
#pragma once
// clang-format off

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "args/attention.h"
#include "checks.h"

namespace tokenprune {
"""


def quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def words(choice: Choice) -> str:
    listed = "{" + ", ".join(map(quoted, choice.words)) + "}"
    return f"{listed}, {quoted(choice.alone)}" if choice.alone else listed


def number(value: float) -> str:
    infinity = "std::numeric_limits<double>::infinity()"
    return infinity if value == float("inf") else f"-{infinity}" if value == float("-inf") else f"{value:g}"


def check_tensor(a: Argument, kind: TensorKind, first: str | None, named: set[str], known: set[str]) -> list[str]:
    """The check of one tensor, and the sizes that it names: -1, which leaves a size free, while tensors are absent."""
    text = quoted(kind.text)
    lines = []
    if first is None and kind.dtypes is FLOATS:
        lines.append(f"check_floating(op, {quoted(a.name)}, {a.name}, {text}, {len(kind.shape)});")
    else:
        sizes = ", ".join(s if s.isdigit() or s in named else "-1" for s in kind.shape)
        dtype = "std::nullopt" if kind.dtypes is FLOATS else f"ScalarType::{SCALAR_TYPES[kind.dtypes[0]]}"
        like = f", {quoted(kind.like)}" if kind.like else ""
        of = first or a.name
        lines.append(f"check_beside(op, {quoted(a.name)}, {a.name}, {of}, {text}, {{{sizes}}}, {dtype}{like});")
    for d, letter in enumerate(kind.shape):
        if letter.isdigit() or letter in known:
            continue
        declared = "" if letter in named else f"[[maybe_unused]] {'const ' if a.required else ''}int64_t "
        before = letter if letter in named else -1
        size = f"{a.name}.size({d})" if a.required else f"{a.name} ? {a.name}->size({d}) : {before}"
        lines.append(f"{declared}{letter} = {size};")
    if a.required:
        known.update(kind.shape)
    named.update(kind.shape)
    return lines


def check_function(op: Op) -> str:
    choices = [a for a in op.arguments if isinstance(a.kind, Choice)]
    struct = "".join(word.capitalize() for word in op.name.split("_")) + "Choices"
    lines, named, known, first = [], set[str](), set[str](), None
    for a in op.arguments:
        if isinstance(a.kind, TensorKind):
            lines += check_tensor(a, a.kind, first, named, known)
            first = first or a.name
        elif isinstance(a.kind, Count):
            lines.append(f"check_count(op, {quoted(a.name)}, {a.name}, B);")
        elif isinstance(a.kind, AtLeast):
            lines.append(f"check_at_least(op, {quoted(a.name)}, {a.name}, {a.kind.low});")
        elif isinstance(a.kind, Number):
            bounds = f"{number(a.kind.low)}, {str(a.kind.above).lower()}, {number(a.kind.high)}"
            lines.append(f"check_real(op, {quoted(a.name)}, {a.name}, {bounds});")
    if op.rule is not None:
        lines.append(f"{op.rule.cpp};")
    if op.work is not None:
        blamed, product = op.work
        factors = re.sub(r"(max|min)\(", r"std::\1(", product.replace(" * ", ", "))
        lines.append(f"check_work(op, {quoted(blamed)}, {quoted(product)}, {{{factors}}});")
    if choices:
        parsed = [
            f"check_{'choices' if a.kind.joined else 'choice'}(op, {quoted(a.name)}, {a.name}, {words(a.kind)})"
            for a in choices
            if isinstance(a.kind, Choice)
        ]
        lines.append(f"return {{{', '.join(parsed)}}};")
    used = {a.name for a in op.arguments if a.kind is not None}
    parameters = ", ".join(TYPES[a.type] + (f" {a.name}" if a.name in used else "") for a in op.arguments)
    body = "\n".join("  " + line for line in [f"const char* op = {quoted(op.name)};", *lines])
    made = f"inline {struct if choices else 'void'} check_{op.name.removeprefix('_')}({parameters}) {{\n{body}\n}}\n"
    if not choices:
        return made
    fields = "".join(
        f"  {'std::vector<int>' if isinstance(a.kind, Choice) and a.kind.joined else 'int'} {a.name};\n"
        for a in choices
    )
    return f"// Which of the words each option is.\nstruct {struct} {{\n{fields}}};\n\n{made}"


def generated() -> str:
    compiled = [OPS[name] for name in compiled_ops()]
    definitions = "".join(f"  m.def({quoted(op.name + op.schema)});\n" for op in compiled)
    checks = [check_function(op) for op in compiled if op.outputs]  # lists of tensors are checked by hand, in csrc/args
    return (
        f"{HEADER}\n// Defines the ops in a library: torch.ops.tokenprune, or the emulator's namespace.\n"
        f"inline void define_ops(torch::stable::detail::StableLibrary& m) {{\n{definitions}}}\n\n"
        + "\n".join(checks)
        + "\n}  // namespace tokenprune\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the file is out of date")
    if not parser.parse_args().check:
        FILE.write_text(generated())
    elif FILE.read_text() != generated():
        raise SystemExit(f"{FILE.name} is out of date: run python -m scripts.generate_ops")


if __name__ == "__main__":
    main()
