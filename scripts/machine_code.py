"""The machine code of CUDA kernels as loops: what one iteration of each takes to issue, read from the disassembly.

Nothing is executed, so rules say which way an iteration goes. A warp stays together: BRA.DIV, which leaves for the
code of divergent warps, is never taken. Operands are ordinary: where there is a way around a routine of the compiler
(a division of 64 bits, the root of a denormal number), it is taken. Of two other ways it is the one with more matrix
instructions, then the one with more 16-byte accesses: copies of aligned memory are counted, and not the fallback; then
one with exponentials: a way around the softmax does no work. Where all are equal, there are two answers: an iteration
takes at most the heavier one, every condition on its way met, and at least the lighter one, everything skipped that can
be. An instruction is one issue slot of its warp, predicated off or not.
"""

from __future__ import annotations

import itertools
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
EXPONENTIAL = re.compile(r"MUFU\.EX2\b")
GLOBAL_LOAD = re.compile(r"LDG(STS)?\b")
GLOBAL = re.compile(r"(LDG(STS)?|STG)\b")
FENCE = re.compile(r"MEMBAR\.\S*(GPU|SYS)")
BARRIER = re.compile(r"(BAR\.|UCGABAR_WAIT)")
BRANCH = re.compile(r"(BRA|BRXU?|JMP|JMXU?)\b")
LEAVES = re.compile(r"(EXIT|RET|KILL|BRA|BRXU?|JMP|JMXU?)\b")
START, END = -1, -2  # of an iteration, beside the numbers of blocks


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
    most_inner: list[Loop]  # that the heaviest iteration can go through
    least_inner: list[Loop]


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


def weight(instructions: list[Instruction], sign: int) -> int:
    """Which way is taken, as a number: matrix instructions, 16-byte accesses, and many instructions, or few of them."""
    matrix = sum(bool(MATRIX.match(instruction.text)) for instruction in instructions)
    wide = sum(instruction.global_bytes == 16 for instruction in instructions)
    return (matrix << 40) + (wide << 20) + sign * len(instructions)


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
        (most, most_inner), (least, least_inner) = (way(blocks, body, inner, ends, sign) for sign in (1, -1))
        found.append(Loop(min(entered), frozenset(members), inner, most, least, most_inner, least_inner))
    return sorted(found, key=lambda loop: loop.header)


def way(
    blocks: list[Block], body: nx.DiGraph, inner: list[Loop], ends: set[int], sign: int
) -> tuple[list[int], list[Loop]]:
    """The blocks of the heaviest (sign 1) or lightest (-1) iteration, from where the loop is entered to a jump back.

    Exponentials that it could go through as well are not skipped. Inner loops are listed, without their blocks: those
    that it goes through, once each, and those that it could. Neither counts where other code stands in for it.
    """
    node = {block: loop.header for loop in inner for block in loop.blocks}
    loops = {loop.header: loop for loop in inner}
    steps = nx.DiGraph()
    steps.add_nodes_from(node.get(block, block) for block in body)
    steps.add_edges_from((node.get(a, a), node.get(b, b)) for a, b in body.edges if node.get(a, a) != node.get(b, b))
    # A block without one before it is where the loop is entered.
    steps.add_edges_from([(START, at) for at, degree in steps.in_degree if degree == 0])
    steps.add_edges_from((node.get(end, end), END) for end in ends)
    code = {
        at: [i for block in (all_blocks(loops[at], sign) if at in loops else [at]) for i in blocks[block].instructions]
        for at in set(steps) - {START, END}
    }
    weights = {at: weight(found, sign) for at, found in code.items()} | {START: 0, END: 0}
    exponentials = [at for at, found in code.items() if any(EXPONENTIAL.match(i.text) for i in found)]
    _, path = best_path(steps, weights)
    while more := [at for at in exponentials if at not in path and fits(steps, path, at)]:
        # Of those that stand in for each other the one that is best.
        steps = max((through(steps, at) for at in more), key=lambda steps: best_path(steps, weights))
        _, path = best_path(steps, weights)
    return (
        [block for block in path[1:-1] if block not in loops],
        [loop for at, loop in loops.items() if at in path or fits(steps, path, at)],
    )


def best_path(steps: nx.DiGraph, weights: dict[int, int]) -> tuple[int, list[int]]:
    """From START to END: its weight and its nodes."""
    best = {START: (0, [START])}
    for at in nx.topological_sort(steps):
        if before := [best[step] for step in steps.predecessors(at) if step in best]:
            total, path = max(before)
            best[at] = total + weights[at], [*path, at]
    return best[END]


def fits(steps: nx.DiGraph, path: list[int], at: int) -> bool:
    """Whether a path goes through all nodes of this one and `at`, which is none of them."""
    if at not in steps:
        return False
    before, behind = nx.ancestors(steps, at), nx.descendants(steps, at)
    return any(a in before and b in behind for a, b in itertools.pairwise(path))


def through(steps: nx.DiGraph, at: int) -> nx.DiGraph:
    """What is left without the paths that avoid `at`."""
    before, behind = nx.ancestors(steps, at), nx.descendants(steps, at)
    kept = steps.subgraph({at, *before, *behind}).copy()
    kept.remove_edges_from([(a, b) for a, b in kept.edges if a in before and b in behind])
    return kept


def all_blocks(loop: Loop, sign: int) -> list[int]:
    """Of one iteration, the heaviest or the lightest, with the inner loops that it goes through."""
    own, inner = (loop.most, loop.most_inner) if sign > 0 else (loop.least, loop.least_inner)
    return [*own, *(block for one in inner for block in all_blocks(one, sign))]


def functions(listing: str) -> Iterator[Function]:
    """The kernels of a listing of nvdisasm."""
    _, *sections = re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)
    for section in sections:
        name = section.split(",", 1)[0]
        blocks, graph = blocks_of(section.splitlines())
        reached = graph.subgraph({0} | nx.descendants(graph, 0))
        yield Function(name, blocks, loops_of(blocks, reached))
