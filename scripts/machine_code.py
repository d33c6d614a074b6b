"""The machine code of CUDA kernels as loops: what one iteration of each takes to issue, read from the disassembly.

Nothing is executed, so rules say which way an iteration goes. A warp stays together: BRA.DIV, which leaves for the
code of divergent warps, is never taken. Operands are ordinary: where there is a way around a routine of the compiler
(a division of 64 bits, the root of a denormal number), it is taken. Of two other ways it is the one with more matrix
instructions, then the one with more 16-byte accesses: copies of aligned memory are counted, and not the fallback. Where
both are equal, there are two answers: an iteration takes at most the heavier one, every condition on its way met, and
at least the lighter one, everything skipped that can be. An instruction is one issue slot of its warp, predicated off
or not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import networkx as nx

from testing.cuda_tools import cuobjdump, nvdisasm

MATRIX = re.compile(r"[HIBDQ]G?MMA\b")
SPECIAL = re.compile(r"MUFU\b")
GLOBAL_LOAD = re.compile(r"LDG(STS)?\b")
GLOBAL = re.compile(r"(LDG(STS)?|STG)\b")
FENCE = re.compile(r"MEMBAR\.\S*(GPU|SYS)")
BARRIER = re.compile(r"(BAR\.|UCGABAR_WAIT)")
BRANCH = re.compile(r"(BRA|BRXU?|JMP|JMXU?)\b")
LEAVES = re.compile(r"(EXIT|RET|KILL|BRA|BRXU?|JMP|JMXU?)\b")


class Instruction(NamedTuple):
    predicate: str  # "@!P0", or nothing
    text: str  # opcode and operands
    line: str  # "file:line" of the source, where the object has it

    @property
    def global_bytes(self) -> int:
        """Bytes that one thread moves from or to global memory."""
        if not GLOBAL.match(self.text):
            return 0
        opcode = self.text.split()[0]
        width = re.search(r"\.(?:[US])?(8|16|64|128)\b", opcode)
        return int(width[1]) // 8 if width else 4


@dataclass
class Block:
    """Instructions without a jump into or out of their middle."""

    instructions: list[Instruction]


@dataclass
class Loop:
    header: int
    blocks: frozenset[int]
    inner: list[Loop]
    most: list[int]  # the blocks of the heaviest iteration, those of inner loops left out
    least: list[int]  # of the lightest


@dataclass
class Function:
    """One kernel: its basic blocks, and its outermost loops in the order of the code."""

    name: str  # mangled
    blocks: list[Block]
    loops: list[Loop]

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        return [instruction for block in blocks for instruction in self.blocks[block].instructions]


def nests(loops: Iterable[Loop], depth: int = 0) -> Iterator[tuple[int, Loop]]:
    """Every loop with its depth, an outer one before its inner ones."""
    for loop in loops:
        yield depth, loop
        yield from nests(loop.inner, depth + 1)


def disassemble(file: Path, architecture: str) -> str:
    """What nvdisasm says of one architecture in an object file, a library or a cubin."""
    tools = cuobjdump(), nvdisasm()
    if None in tools:
        raise FileNotFoundError("cuobjdump or nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory(prefix="tokenprune-cubin-") as folder:
        extract = [str(tools[0]), "-xelf", architecture, str(file.resolve())]
        subprocess.run(extract, cwd=folder, capture_output=True, text=True, check=True)
        cubins = sorted(Path(folder).glob(f"*.{architecture}.cubin"))
        if not cubins:
            raise ValueError(f"{file} has no code for {architecture}")
        show = [str(tools[1]), "-g", "-c"]
        return "".join(
            subprocess.run([*show, str(cubin)], capture_output=True, text=True, check=True).stdout for cubin in cubins
        )


def blocks_of(lines: Iterable[str]) -> tuple[list[Block], nx.DiGraph]:
    """Basic blocks and the jumps between them, from the lines of one function."""
    blocks, labels, source = [Block([])], dict[str, int](), ""
    for line in lines:
        if label := re.match(r"(\.L\S*):", line):
            if blocks[-1].instructions:
                blocks.append(Block([]))
            labels[label[1]] = len(blocks) - 1
        elif place := re.match(r'\s*//## File "(?:.*/)?(.+?)", line (\d+)', line):
            source = f"{place[1]}:{place[2]}"
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*(\S.*?)\s*;?\s*$", line):
            blocks[-1].instructions.append(Instruction(code[1] or "", code[2].rstrip("; "), source))
            if LEAVES.match(code[2]):
                blocks.append(Block([]))
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(blocks)))
    for number, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else Instruction("", "NOP", "")
        jumps = BRANCH.match(last.text) and not last.text.startswith("BRA.DIV")
        targets = re.findall(r"\.L[\w.]*", last.text) if jumps else []
        graph.add_edges_from((number, labels[target]) for target in targets)
        if (falls_through(last) or not LEAVES.match(last.text)) and number + 1 < len(blocks):
            graph.add_edge(number, number + 1)
    calls = {n for n, block in enumerate(blocks) if any(i.text.startswith("CALL.") for i in block.instructions)}
    avoidable = [(a, b) for a, b in graph.edges if b in calls and set(graph.successors(a)) - calls]
    graph.remove_edges_from(avoidable)
    return blocks, graph


def falls_through(jump: Instruction) -> bool:
    """Whether what follows a jump can be next: it has a condition, `@P0 BRA x` or `BRA P0, x` or `BRA.U UP0, x`."""
    return bool(jump.predicate) or bool(re.match(r"BRA\S* !?U", jump.text)) or bool(re.match(r"BRA !?P", jump.text))


def weight(blocks: Iterable[Block], sign: int) -> int:
    """Which way is taken, as a number: matrix instructions, 16-byte accesses, and many instructions, or few of them."""
    found = [instruction for block in blocks for instruction in block.instructions]
    matrix = sum(bool(MATRIX.match(instruction.text)) for instruction in found)
    return (matrix << 40) + (sum(instruction.global_bytes == 16 for instruction in found) << 20) + sign * len(found)


def loops_of(blocks: list[Block], graph: nx.DiGraph) -> list[Loop]:
    """Blocks that reach each other are a loop; what is left of it without the jumps to its entry has the inner ones."""
    found = []
    for members in nx.strongly_connected_components(graph):
        if len(members) == 1 and not graph.has_edge(*members, *members):
            continue
        entered = {b for _, b in nx.edge_boundary(graph, set(graph) - members, members)} or {min(members)}
        body = graph.subgraph(members).copy()
        body.remove_edges_from([(a, b) for a, b in body.edges if b in entered])
        inner = loops_of(blocks, body)
        ends = {a for a in members if entered & set(graph.successors(a))}
        most, least = (way(blocks, body, inner, ends, sign) for sign in (1, -1))
        found.append(Loop(min(entered), frozenset(members), inner, most, least))
    return sorted(found, key=lambda loop: loop.header)


def way(blocks: list[Block], body: nx.DiGraph, inner: list[Loop], ends: set[int], sign: int) -> list[int]:
    """The blocks of the heaviest (sign 1) or lightest (-1) iteration, from where the loop is entered to a jump back.

    It goes through each inner loop on its way once, and leaves its blocks out.
    """
    node = {block: loop.header for loop in inner for block in loop.blocks}
    paths = {loop.header: loop.most if sign > 0 else loop.least for loop in inner}
    steps = nx.DiGraph()
    steps.add_nodes_from(node.get(block, block) for block in body)
    steps.add_edges_from((node.get(a, a), node.get(b, b)) for a, b in body.edges if node.get(a, a) != node.get(b, b))
    best: dict[int, tuple[int, list[int]]] = {}
    for at in nx.topological_sort(steps):
        # A block without one before it is where the loop is entered.
        total, path = max((best[before] for before in steps.predecessors(at)), default=(0, list[int]()))
        best[at] = total + weight((blocks[block] for block in paths.get(at, [at])), sign), [*path, at]
    _, path = max(best[node.get(end, end)] for end in ends)
    return [block for block in path if block not in paths]


def functions(listing: str) -> Iterator[Function]:
    """The kernels of a listing of nvdisasm."""
    _, *sections = re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)
    for section in sections:
        name = section.split(",", 1)[0]
        blocks, graph = blocks_of(section.splitlines())
        reached = graph.subgraph({0} | nx.descendants(graph, 0))
        yield Function(name, blocks, loops_of(blocks, reached))
