"""How many products an accumulator of a matrix unit takes before it starts anew, read from PTX. Needs no Triton.

A register that an instruction for matrices writes holds as many products as its accumulator held, and those of the
instruction. Copies hold what they copy; what any other instruction writes, an add.f32 above all, holds none. The counts
go along every path of the control flow until none of them grows; in a loop that never restarts they grow without end.
"""

import re
from typing import NamedTuple

MOST = 128  # tokenprune_kernels/triton/product.py
UNBOUNDED = 1 << 20

REGISTER = re.compile(r"%\w+")
MMA = re.compile(r"(?:wgmma\.mma_async|mma\.sync)\.\S*m\d+n\d+k(\d+)\.")
TENSOR_MEMORY = re.compile(r"tcgen05\.mma\.\S*kind::f16\S* (\[[^\]]*\])")
TENSOR_MEMORY_K = 16  # of the kind of 16-bit floats

Counts = dict[str, int]


class Block(NamedTuple):
    label: str
    instructions: list[str]
    targets: list[str]  # where it jumps
    falls: bool  # into the next one


def blocks(ptx: str) -> list[Block]:
    found = [Block("", [], [], True)]
    for line in ptx.splitlines():
        text = line.partition("//")[0].strip()
        label = re.fullmatch(r"(\$L__BB\w+):", text)  # all others are for the debugger
        if label:
            found.append(Block(label[1], [], [], True))
            continue
        jump = re.match(r"(@!?%\w+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+);", text)
        if jump:
            found[-1].targets.append(jump[2])
            found[-1] = found[-1]._replace(falls=jump[1] is not None)
            found.append(Block("", [], [], True))
        elif text.endswith(";"):
            found[-1].instructions.append(re.sub(r"^@!?%\w+\s+", "", text))
    for i in range(len(found) - 1):
        if found[i].falls and any(TENSOR_MEMORY.match(text) for text in found[i + 1].instructions):
            found[i].targets.clear()  # one warp of a program issues these instructions, all of them: others jump
    return found


def never(ptx: str) -> set[str]:
    """Predicates that are always false: as "accumulate" they say that the instruction starts anew."""
    values: dict[str, set[str]] = {}
    for text in ptx.splitlines():
        written = re.match(r"\s*(?:@\S+\s+)?(mov\.pred|setp\S*|\w+\.pred)\s+(%\w+), (.*);", text)
        if written:
            values.setdefault(written[2], set()).add(written[3] if written[1] == "mov.pred" else "?")
    return {name for name, value in values.items() if value == {"0"}} | {"0"}


def operands(text: str) -> list[list[str]]:
    """Lists of registers, braces kept together; a number or an address is a list with its text."""
    found = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text)
    return [REGISTER.findall(o) if o.startswith("{") else [o] for o in found]


def step(instruction: str, counts: Counts, fresh: set[str]) -> int:
    """What one instruction does to the counts; the products in the accumulator that it leaves, if it is one's."""
    name, _, rest = instruction.rstrip(";").replace("\t", " ").partition(" ")
    memory = TENSOR_MEMORY.match(instruction)
    if memory:
        restarts = operands(rest)[4][0] in fresh
        counts[memory[1]] = min(UNBOUNDED, (0 if restarts else counts.get(memory[1], 0)) + TENSOR_MEMORY_K)
        return counts[memory[1]]
    parts = operands(rest)
    product = MMA.match(name)
    if product:
        written = parts[0]
        before = written if name.startswith("wgmma") else parts[3]
        restarts = name.startswith("wgmma") and parts[3][0] in fresh
        after = [(0 if restarts else counts.get(r, 0)) + int(product[1]) for r in before]
        counts.update(zip(written, after, strict=True))
        return max(after)
    if not parts or not all(r.startswith("%") for r in parts[0]):
        return 0
    held = 0
    if name.startswith("tcgen05.ld"):
        held = max((n for r, n in counts.items() if r.startswith("[")), default=0)
    elif name.startswith(("mov.", "selp.")):
        held = max((counts.get(r, 0) for part in parts[1:] for r in part), default=0)
    for r in parts[0]:
        counts[r] = held
    return 0


def longest(ptx: str) -> int:
    """The most products that an accumulator takes, 0 without matrix instructions, UNBOUNDED where a loop adds to it."""
    code, fresh = blocks(ptx), never(ptx)
    at = {block.label: i for i, block in enumerate(code) if block.label}
    before: list[Counts] = [{} for _ in code]
    waiting, most = [*range(len(code))], 0
    while waiting:
        i = waiting.pop(0)
        counts = dict(before[i])
        for instruction in code[i].instructions:
            most = max(most, step(instruction, counts, fresh))
        if most > 4 * MOST:
            return UNBOUNDED
        for j in [at[label] for label in code[i].targets] + ([i + 1] if code[i].falls and i + 1 < len(code) else []):
            grown = {r: n for r, n in counts.items() if n > before[j].get(r, 0)}
            if grown:
                before[j].update(grown)
                waiting += [j] if j not in waiting else []
    return most
